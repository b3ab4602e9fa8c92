"""Makes the prompts of LongBench from the official data: in templates, and with the middle cut out where too long."""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.errors import UserError
from sdtp.evaluation.longbench.tasks import Prompt, task
from sdtp.evaluation.longbench.templates import TEMPLATES
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.longbench_data import Example, read_longbench
from sdtp.pipeline.longbench_prompts import longbench_prompt, read_templates
from sdtp.pipeline.models import load_tokenizer, read_manifest
from sdtp.pipeline.step import step
from sdtp.pipeline.target_settings import LongBenchSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "suites.longbench"


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp longbench-data", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="seed and suites.longbench")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, for its tokenizer")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="examples to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    chosen = settings.suites.longbench
    with step("longbench-data", args, outputs=[args.output]) as log:
        check_limits(chosen, read_manifest(args.model)["context_length"])
        if chosen.source is None:
            raise UserError(f"{KEY}.source is null: LongBench's data, on the hub or in a folder, are needed")
        data = read_longbench(chosen.source, f"{KEY}.source", chosen.tasks)
        examples = draw(data.examples, chosen.examples, settings.seed)
        rows = list(make(load_tokenizer(args.model), examples, chosen))
        write_jsonl(args.output, rows)
        log.metrics({f"{name}/examples": count for name, count in Counter(row["task"] for row in rows).items()})
        log.metric("prompt_tokens", sum(len(row["prompt_ids"]) for row in rows))
        log.metric("prompts_cut", sum(row["tokens_cut"] > 0 for row in rows))
        log.metric("tokens_cut", sum(row["tokens_cut"] for row in rows))
        log.dataset("longbench", args.output, data.sha256, data.revision)


def check_limits(settings: LongBenchSettings, context: int | None) -> None:
    """Raise UserError where the longest prompt and the longest answer of a task are together beyond the context."""
    for name in settings.tasks:
        answer = task(name).max_new_tokens
        check_context({f"{KEY}.max_tokens": settings.max_tokens, f"longest answer of {name}": answer}, context)


def draw(examples: tuple[Example, ...], most: int | None, seed: int) -> list[Example]:
    """At most so many examples of each task, in the order of the files; None for all.

    Which ones depends on the seed and the task alone, and those of a smaller number are among those of a larger one.
    """
    if most is None:
        return list(examples)
    chosen: set[tuple[str, str]] = set()
    for name in dict.fromkeys(example.task for example in examples):
        own = [(example.task, example.id) for example in examples if example.task == name]
        random.Random(f"{seed}/longbench/{name}").shuffle(own)
        chosen.update(own[:most])
    return [example for example in examples if (example.task, example.id) in chosen]


def make(
    tokenizer: "PreTrainedTokenizerBase", examples: list[Example], settings: LongBenchSettings
) -> Iterator[dict[str, Any]]:
    """A row of the file for each example."""
    templates = read_templates(settings.templates, settings.tasks) if settings.templates else TEMPLATES
    for example in tqdm(examples, desc="writing prompts", unit="example"):
        prompt = longbench_prompt(tokenizer, example, templates[example.task], settings.max_tokens)
        yield row(example, prompt)


def row(example: Example, prompt: Prompt) -> dict[str, Any]:
    """An example as a row of the file."""
    kind = task(example.task)
    return {
        "suite": "longbench",
        "category": kind.category.value,
        "id": example.id,
        "task": example.task,
        "prompt_ids": prompt.ids,
        "context": prompt.context,
        "tokens_cut": prompt.tokens_cut,
        "chat": prompt.chat,
        "max_new_tokens": kind.max_new_tokens,
        "answers": list(example.reference.answers),
        "classes": list(example.reference.classes),
    }
