"""Writes prompts, each with the tokens that a layer sees of it under a schedule, for methods of other environments."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdtp.evaluation.peers.budgets import Budget, kept, mean_entries
from sdtp.pipeline.benchmark_text import benchmark_prompt
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split, split_hash
from sdtp.pipeline.files import read_jsonl, sha256_file, write_jsonl
from sdtp.pipeline.models import read_manifest
from sdtp.pipeline.schedules import build_schedule
from sdtp.pipeline.step import step

# What is needed of an example of the test split.
TEST_COLUMNS = ["id", "task", "prompt_ids", "response_ids"]


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp budgets", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="pruning settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, for its manifest")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--data", type=Path, metavar="DIR", help="folder of the test examples")
    prompts.add_argument("--text", type=Path, metavar="JSON", help="the benchmark's text: prompts that are timed")
    prompts.add_argument("--suite", type=Path, metavar="JSONL", help="prompts of a suite, whose rows stay whole")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("budgets", args, outputs=[args.output], wildcards={"keep_ratio": args.keep_ratio}) as log:
        layers = read_manifest(args.model)["num_layers"]
        schedule = build_schedule(settings.pruning, layers, args.keep_ratio)
        if args.suite:
            examples = read_jsonl(args.suite)
            log.dataset("suite", args.suite, sha256_file(args.suite))
        elif args.text:
            examples = timed_examples(args.text, settings.peers.prompt_tokens)
            log.dataset("benchmark", args.text, sha256_file(args.text))
        else:
            examples = load_split(args.data, "test").select_columns(TEST_COLUMNS).to_list()
            log.dataset("test", args.data / "test", split_hash(args.data, "test"))
        rows = budgeted(examples, mean_entries(schedule, layers))
        write_jsonl(args.output, rows)
        log.metric("kept_share", sum(row["entries"] / len(row["prompt_ids"]) for row in rows) / len(rows))


def timed_examples(text: Path, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The benchmark's prompts in the form of test examples, without a task or a response.

    Raises:
        UserError: the benchmark's text is shorter than a length.
    """
    return [
        {"id": str(length), "task": None, "prompt_ids": benchmark_prompt(text, length), "response_ids": []}
        for length in lengths
    ]


def budgeted(examples: Iterable[dict[str, Any]], budget: Budget) -> list[dict[str, Any]]:
    """What another program needs to evaluate a method on examples at a budget.

    Args:
        examples: with `prompt_ids`.
        budget: of so many prompt tokens those that a layer may see, and its cache hold.

    Returns:
        The examples, each with `entries`, the budget of its prompt.
    """
    return [{**example, "entries": kept(budget, len(example["prompt_ids"]))} for example in examples]
