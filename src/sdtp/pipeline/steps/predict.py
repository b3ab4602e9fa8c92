"""Predicts the answers of one method at one keep ratio to a suite's prompts; none is predicted twice."""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.evaluation import methods, names
from sdtp.evaluation.longbench import predicting as longbench
from sdtp.evaluation.longbench.tasks import Prompt
from sdtp.evaluation.ruler import predicting as ruler
from sdtp.evaluation.ruler.tasks import RulerExample
from sdtp.evaluation.suite_rows import COUNTS, KEPT, SUITES
from sdtp.pipeline.chosen import check_method, chosen_method, seeds_of
from sdtp.pipeline.config import Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import sha256_file, write_jsonl
from sdtp.pipeline.models import load_model, load_tokenizer
from sdtp.pipeline.predictions import Answer, Predictions, keys, read_examples, what_decides
from sdtp.pipeline.step import step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of an example, what its prediction is not held against and nobody needs beside it.
_LEFT_OUT = ("prompt_ids", "context", "prompt", "max_new_tokens")


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp predict", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning, the method's own settings")
    parser.add_argument("--suite", required=True, choices=SUITES, help="which one the examples are of")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--examples", required=True, type=Path, metavar="JSONL", help="the suite's prompts")
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="trained pruner, for what uses it")
    parser.add_argument("--method", required=True, choices=names.METHODS, help="what prunes")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="JSONL", help="predictions, as they are made")
    parser.add_argument("--code", required=True, metavar="HASH", help="of the code; no other code's predictions count")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example and seed")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    check_method(args.method, args.keep_ratio, args.pruner)
    settings = Settings.from_json(args.settings)
    wildcards = {"suite": args.suite, "method": args.method, "keep_ratio": args.keep_ratio}
    with step("predict", args, outputs=[args.output], wildcards=wildcards) as log:
        log.dataset(args.suite, args.examples, sha256_file(args.examples))
        examples = list(read_examples(args.examples, args.suite))
        given = json.loads(args.settings)
        made_from = what_decides(given, args.model, args.pruner, args.method, args.keep_ratio, args.code)
        done = Predictions(args.checkpoint, Answer)
        loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        rows, taken = [], 0
        for seed in seeds_of(args.method, settings):
            hashes = keys(examples, made_from, seed)
            missing = [(key, example) for key, example in zip(hashes, examples, strict=True) if key not in done]
            taken += len(examples) - len(missing)
            if missing:
                if loaded is None:
                    model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
                    loaded = model, load_tokenizer(args.model)
                pruner_for = chosen_method(args.method, settings, loaded[0], args.keep_ratio, args.pruner, seed)
                due = [example for _, example in missing]
                answers = predict(*loaded, pruner_for, due, settings.suites.batch_tokens)
                for (key, _), answer in tqdm(
                    zip(missing, answers, strict=True),
                    total=len(examples),
                    initial=len(examples) - len(missing),
                    desc="predicting",
                    unit="example",
                ):
                    done.add(key, answer)
            identity = {"method": args.method, "keep_ratio": args.keep_ratio, "seed": seed}
            rows += [row(example, identity, key, done[key]) for key, example in zip(hashes, examples, strict=True)]
        write_jsonl(args.output, rows)
        log.metric("predictions", len(rows))
        log.metric("predictions_taken_over", taken)
        log.metric("kept_share", sum(row["kept_tokens"] for row in rows) / sum(row["prompt_tokens"] for row in rows))
        log.artifact(args.output)


def predict(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pruner_for: methods.PrunerFor,
    examples: Sequence[dict[str, Any]],
    batch_tokens: int,
) -> Iterator[Answer]:
    """The answers to examples of one suite, in their order, as they are made.

    Args:
        model: eval mode, unhooked.
        tokenizer: the model's.
        pruner_for: see `methods`; RULER's neighbours of one length run together where it is the same for all.
        examples: rows of the suite's file.
        batch_tokens: most prompt tokens of a batch; a longer prompt runs alone.
    """
    together = isinstance(pruner_for, methods.Fixed) and pruner_for.batches
    for batch in batches(examples, batch_tokens if together else 1):
        pruner = pruner_for(batch[0]["prompt_ids"], [])
        if batch[0]["suite"] == "ruler":
            known = [RulerExample(**_without(row, ("suite", "category"))) for row in batch]
            rows: Iterator[Any] = ruler.predict(model, tokenizer, pruner, known, len(batch))
        else:
            prompts = (
                Prompt(row["id"], row["task"], row["prompt_ids"], tuple(row["context"]), row["tokens_cut"], row["chat"])
                for row in batch
            )
            rows = longbench.predict(model, tokenizer, pruner, prompts)
        for row in rows:
            yield Answer(prediction=row["prediction"], kept_tokens=row["kept_tokens"])


def batches(examples: Sequence[dict[str, Any]], tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Neighbours of one suite and prompt length together, up to so many prompt tokens; a longer prompt alone."""
    for length, equal in groupby(examples, key=lambda row: len(row["prompt_ids"])):
        size = max(1, tokens // length)
        while batch := [row for _, row in zip(range(size), equal, strict=False)]:
            yield batch


def row(example: dict[str, Any], identity: dict[str, Any], key: str, answer: Answer) -> dict[str, Any]:
    """A prediction as a row of the file: who made it, from what, and all that `sdtp score` needs."""
    whole = {**example, **identity, "prompt_tokens": len(example["prompt_ids"]), **answer, "hash": key}
    first = {name: whole[name] for name in (*KEPT, *COUNTS, "prediction")}
    return {**first, **_without(whole, (*first, *_LEFT_OUT))}


def _without(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in columns}
