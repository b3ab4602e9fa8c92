"""Makes the prompts of the RULER-style tasks: each task at each length."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.evaluation.ruler.tasks import CATEGORIES, RulerExample
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import sha256_file, write_jsonl
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import load_tokenizer, read_manifest
from sdtp.pipeline.ruler.examples import ruler_examples
from sdtp.pipeline.ruler.questions import read_passages
from sdtp.pipeline.ruler.texts import read_documents
from sdtp.pipeline.step import step
from sdtp.pipeline.target_settings import RulerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp ruler-data", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="seed and suites.ruler")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, for its tokenizer")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="examples to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("ruler-data", args, outputs=[args.output]) as log:
        context = read_manifest(args.model)["context_length"]
        check_context({"suites.ruler.lengths": max(settings.suites.ruler.lengths)}, context)
        examples = list(make(load_tokenizer(args.model), settings.suites.ruler, settings.seed))
        for example in examples:
            prompt, answer = len(example.prompt_ids), example.max_new_tokens
            check_context({"suites.ruler.lengths": prompt, f"answer of {example.id}": answer}, context)
        write_jsonl(args.output, (row(example) for example in examples))
        log.metric("examples", len(examples))
        log.metric("prompt_tokens", sum(len(example.prompt_ids) for example in examples))
        log.dataset("ruler", args.output, sha256_file(args.output))


def make(tokenizer: "PreTrainedTokenizerBase", settings: RulerSettings, seed: int) -> Iterator[RulerExample]:
    """The examples of all tasks at all lengths, those of one length together, shortest first."""
    documents, _ = read_documents(settings.source, "suites.ruler.source")
    passages = read_passages(settings.passages, "suites.ruler.passages") if settings.passages else None
    cells = [(length, task) for length in sorted(settings.lengths) for task in settings.tasks]
    for length, task in tqdm(cells, desc="writing prompts", unit="task"):
        yield from ruler_examples(
            tokenizer,
            documents,
            settings,
            task=task,
            length=length,
            count=settings.examples,
            seed=seed,
            passages=passages,
        )


def row(example: RulerExample) -> dict[str, Any]:
    """An example as a row of the file."""
    return {"suite": "ruler", "category": CATEGORIES[example.task], **dataclasses.asdict(example)}
