"""Generates from test prompts, pruned and unpruned side by side, and records what each stage scored and left."""

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from tqdm.auto import tqdm

from sdtp.evaluation.generation import generate_batch
from sdtp.evaluation.references import found
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import load_model, load_tokenizer, read_manifest
from sdtp.pipeline.prompt_trace import Watched
from sdtp.pipeline.pruners import read_pruner_at
from sdtp.pipeline.step import step

# Prompts generated from together. They differ in length, so that larger batches mostly add padding.
BATCH = 4


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp generate", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning and generation settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which test is used")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="generations to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("generate", args, outputs=[args.output], wildcards={"keep_ratio": args.keep_ratio}) as log:
        test = load_split(args.data, "test")
        log.dataset("test", args.data / "test", split_hash(args.data, "test"))
        examples = test.select(spread(test["task"], settings.generation.examples)).to_list()
        new_tokens = settings.generation.max_new_tokens
        longest = max(len(example["prompt_ids"]) for example in examples)
        context = read_manifest(args.model)["context_length"]
        check_context({"longest prompt": longest, "generation.max_new_tokens": new_tokens}, context)
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        tokenizer = load_tokenizer(args.model)
        pruner = read_pruner_at(args.pruner, settings.pruning, model.config.num_hidden_layers, args.keep_ratio)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = []
        for start in tqdm(range(0, len(examples), BATCH), desc="generating", unit="batch"):
            batch = examples[start : start + BATCH]
            prompts = [example["prompt_ids"] for example in batch]
            watched = Watched(pruner)
            results = generate_batch(model, watched.pruner, prompts, new_tokens, pad)
            for row, (example, generated) in enumerate(zip(batch, results, strict=True)):
                rows.append(
                    {
                        "id": example["id"],
                        "task": example["task"],
                        "keep_ratio": args.keep_ratio,
                        "prompt_tokens": len(example["prompt_ids"]),
                        "kept": generated.kept,
                        "scores": by_entrant(watched.scores(row), generated.kept, len(example["prompt_ids"])),
                        "pruned_text": tokenizer.decode(generated.pruned_ids, skip_special_tokens=True),
                        "unpruned_text": tokenizer.decode(generated.unpruned_ids, skip_special_tokens=True),
                        "reference": example["response"],
                    }
                )
        write_jsonl(args.output, rows)
        retrieval = [row for row in rows if row["task"] == "retrieval"]
        for arm in ("pruned", "unpruned") if retrieval else ():
            hits = [all(found(row[f"{arm}_text"], [row["reference"]])) for row in retrieval]
            log.metric(f"{arm}_reference_found", sum(hits) / len(hits))
        log.artifact(args.output)


def by_entrant(
    scores: Sequence[Mapping[int, float]], kept: Sequence[Sequence[int]], prompt_tokens: int
) -> list[list[float | None]]:
    """For each stage the scores of the tokens that entered it, in their order; empty where it asked for none.

    Four significant digits are for reading: equal ones need not have been equal. None is what is no finite number.
    """
    entrants: list[Sequence[int]] = [range(prompt_tokens), *kept[:-1]]
    return [
        [_rounded(stage[position]) for position in entering] if stage else []
        for stage, entering in zip(scores, entrants, strict=True)
    ]


def _rounded(score: float) -> float | None:
    return float(f"{score:.4g}") if math.isfinite(score) else None


def spread(tasks: list[str], count: int) -> list[int]:
    """Indices of the first `count` examples, taking turns between the tasks so that each is shown."""
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_task.setdefault(task, []).append(index)
    turns = (index for turn in zip_longest(*by_task.values()) for index in turn if index is not None)
    return [index for _, index in zip(range(count), turns, strict=False)]
