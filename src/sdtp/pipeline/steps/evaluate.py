"""Measures the quality of one method at one keep ratio on the test examples, teacher-forced."""

import argparse
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import continuation, methods, retrieval
from sdtp.evaluation.teacher_forcing import Forced, force_batch
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.models import load_model
from sdtp.pipeline.schedules import build_schedule
from sdtp.pipeline.step import step
from sdtp.pruning.pruner import TokenPruner
from sdtp.training.batching import length_batches
from sdtp.training.saliency import Reduction, Target


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp evaluate", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning, the method's own settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which test is used")
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="trained pruner; needed for method sdtp")
    parser.add_argument("--method", required=True, choices=methods.METHODS, help="what prunes")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example and seed")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    if args.method == "sdtp" and args.pruner is None:
        raise UserError("--pruner is missing: method sdtp needs the folder of a trained pruner")
    if args.method == "unpruned" and args.keep_ratio != 1.0:
        raise UserError(f"--keep-ratio is {args.keep_ratio}: method unpruned keeps everything, so 1.0 is accepted")
    settings = Settings.from_json(args.settings)
    wildcards = {"method": args.method, "keep_ratio": args.keep_ratio}
    with step("evaluate", args, outputs=[args.output], wildcards=wildcards) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        examples = load_split(args.data, "test").to_list()
        log.dataset("test", args.data / "test", split_hash(args.data, "test"))
        rows = []
        for seed in settings.evaluation.seeds if args.method in methods.SEEDED else (None,):
            pruner_for = choose(args, settings, model, seed)
            identity = {"method": args.method, "keep_ratio": args.keep_ratio, "seed": seed}
            rows += [
                {**row, **identity} for row in evaluate(model, examples, pruner_for, settings.evaluation.batch_tokens)
            ]
        write_jsonl(args.output, rows)
        for task in sorted({row["task"] for row in rows}):
            own = [row for row in rows if row["task"] == task]
            log.metric(f"{task}/loss", sum(row["loss"] for row in own) / len(own))
            log.metric(f"{task}/kept_share", sum(row["kept_tokens"] / row["prompt_tokens"] for row in own) / len(own))
            if task == "retrieval":
                log.metric(f"{task}/accuracy", sum(row["correct"] for row in own) / len(own))
        log.artifact(args.output)


def choose(args: argparse.Namespace, settings: Settings, model: PreTrainedModel, seed: int | None) -> methods.PrunerFor:
    """What prunes each example under `args.method`; `seed` is None for methods without random choices."""
    if args.method == "unpruned":
        return methods.unpruned
    schedule = build_schedule(settings.pruning, model.config.num_hidden_layers, args.keep_ratio)
    if args.method == "sdtp":
        return methods.Fixed(TokenPruner.from_pretrained(args.pruner).with_schedule(schedule))
    if args.method == "oracle":
        # `saliency` itself refuses other words.
        reduction = cast(Reduction, settings.saliency.reduction)
        return methods.oracle(model, schedule, reduction, cast(Target, settings.saliency.target))
    return methods.baseline(args.method, schedule, 0 if seed is None else seed)


def evaluate(
    model: PreTrainedModel, examples: list[dict[str, Any]], pruner_for: methods.PrunerFor, batch_tokens: int
) -> list[dict[str, Any]]:
    """One row an example, in their order.

    Args:
        model: eval mode, unhooked.
        examples: rows of the test split.
        pruner_for: see `methods`; prompts of one length run together where it is the same for all.
        batch_tokens: most prompt tokens of a batch; a longer prompt runs alone.
    """
    rows: dict[int, dict[str, Any]] = {}
    lengths = [len(example["prompt_ids"]) for example in examples]
    together = isinstance(pruner_for, methods.Fixed) and pruner_for.batches
    with tqdm(total=len(examples), desc="evaluating", unit="example") as progress:
        for batch in length_batches(lengths, batch_tokens if together else 1, most_padding=0):
            prompts, responses = ([examples[index][name] for index in batch] for name in ("prompt_ids", "response_ids"))
            pruner = pruner_for(prompts[0], responses[0])
            for index, forced in zip(batch, force_batch(model, prompts, responses, pruner), strict=True):
                rows[index] = _row(examples[index], forced)
            progress.update(len(batch))
    return [rows[index] for index in range(len(examples))]


def _row(example: dict[str, Any], forced: Forced) -> dict[str, Any]:
    return {
        "id": example["id"],
        "task": example["task"],
        "prompt_tokens": len(example["prompt_ids"]),
        "kept_tokens": forced.kept_tokens,
        "correct": retrieval.correct(forced, example["response_ids"]) if example["task"] == "retrieval" else None,
        "loss": continuation.loss(forced),
        "response_tokens": len(example["response_ids"]),
    }
