"""Measures the quality of one method at one keep ratio on the test examples, teacher-forced."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.evaluation import continuation, methods, names, retrieval
from sdtp.evaluation.agreement import Agreement, agreement, check_finite
from sdtp.evaluation.head import Head
from sdtp.evaluation.teacher_forcing import Forced, batch_logits, summary
from sdtp.pipeline.chosen import check_method, chosen_method, seeds_of
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.models import load_model
from sdtp.pipeline.reference import Reference
from sdtp.pipeline.step import step
from sdtp.training.batching import length_batches


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp evaluate", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning, the method's own settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which test is used")
    parser.add_argument("--reference", required=True, type=Path, metavar="FILE", help="made by `sdtp reference`")
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="trained pruner, for what uses it")
    parser.add_argument("--method", required=True, choices=names.METHODS, help="what prunes")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example and seed")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    check_method(args.method, args.keep_ratio, args.pruner)
    settings = Settings.from_json(args.settings)
    wildcards = {"method": args.method, "keep_ratio": args.keep_ratio}
    with step("evaluate", args, outputs=[args.output], wildcards=wildcards) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        examples = load_split(args.data, "test").to_list()
        log.dataset("test", args.data / "test", split_hash(args.data, "test"))
        reference = Reference(args.reference, args.model, model.dtype)
        rows = []
        for seed in seeds_of(args.method, settings):
            pruner_for = chosen_method(args.method, settings, model, args.keep_ratio, args.pruner, seed)
            identity = {"method": args.method, "keep_ratio": args.keep_ratio, "seed": seed}
            rows += [
                {**row, **identity}
                for row in evaluate(model, examples, pruner_for, settings.evaluation.batch_tokens, reference)
            ]
        write_jsonl(args.output, rows)
        for task in sorted({row["task"] for row in rows}):
            own = [row for row in rows if row["task"] == task]
            log.metrics({f"{task}/{name}": sum(row[name] for row in own) / len(own) for name in ("loss", "kl", "top1")})
            log.metric(f"{task}/kept_share", sum(row["kept_tokens"] / row["prompt_tokens"] for row in own) / len(own))
            if task == "retrieval":
                log.metric(f"{task}/accuracy", sum(row["correct"] for row in own) / len(own))
        log.artifact(args.output)


def evaluate(
    model: PreTrainedModel,
    examples: list[dict[str, Any]],
    pruner_for: methods.PrunerFor,
    batch_tokens: int,
    reference: Callable[[Mapping[str, Any]], torch.Tensor],
) -> list[dict[str, Any]]:
    """One row an example, in their order.

    Args:
        model: eval mode, unhooked.
        examples: rows of the test split.
        pruner_for: see `methods`; prompts of one length run together where it is the same for all. Of the unpruned
            model nothing runs but the head, on the reference.
        batch_tokens: most prompt tokens of a batch; a longer prompt runs alone.
        reference: the unpruned model's states [response, hidden] on an example, see `Reference`.

    Raises:
        UserError: what was measured of an example is not finite, naming it.
    """
    head = Head(model)
    if pruner_for == methods.unpruned:  # what it makes of an example is the reference, and is not computed again
        shown = tqdm(examples, desc="evaluating", unit="example")
        return [_row(example, *_unpruned(example, head(reference(example)))) for example in shown]
    rows: dict[int, dict[str, Any]] = {}
    lengths = [len(example["prompt_ids"]) for example in examples]
    together = isinstance(pruner_for, methods.Fixed) and pruner_for.batches
    with tqdm(total=len(examples), desc="evaluating", unit="example") as progress:
        for batch in length_batches(lengths, batch_tokens if together else 1, most_padding=0):
            prompts, responses = ([examples[index][name] for index in batch] for name in ("prompt_ids", "response_ids"))
            pruner = pruner_for(prompts[0], responses[0])
            for index, forced in zip(batch, batch_logits(model, prompts, responses, pruner), strict=True):
                # One example's unpruned logits are held at a time.
                agreed = agreement(forced[0], head(reference(examples[index])))
                rows[index] = _row(examples[index], summary(*forced), agreed)
            progress.update(len(batch))
    return [rows[index] for index in range(len(examples))]


def _unpruned(example: dict[str, Any], logits: torch.Tensor) -> tuple[Forced, Agreement]:
    response = torch.tensor(example["response_ids"], device=logits.device)
    return summary(logits, response, len(example["prompt_ids"])), agreement(logits, logits)


def _row(example: dict[str, Any], forced: Forced, agreed: Agreement) -> dict[str, Any]:
    loss = continuation.loss(forced)
    check_finite(f"example {example['id']!r}", {"loss": loss, "kl": agreed.kl})
    return {
        "id": example["id"],
        "task": example["task"],
        "prompt_tokens": len(example["prompt_ids"]),
        "kept_tokens": forced.kept_tokens,
        "correct": retrieval.correct(forced, example["response_ids"]) if example["task"] == "retrieval" else None,
        "loss": loss,
        "kl": agreed.kl,
        "top1": agreed.top1,
        "response_tokens": len(example["response_ids"]),
    }
