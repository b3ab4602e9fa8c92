"""Makes the local tasks of lm-evaluation-harness: multiple-choice questions over a text, for where there is no hub."""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import atomic_folder, sha256_file
from sdtp.pipeline.harness_tasks import write_task
from sdtp.pipeline.multiple_choice import LOCAL_TASKS, SHOTS, questions
from sdtp.pipeline.ruler.texts import read_documents
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp multiple-choice-data", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="seed and harness.local")
    parser.add_argument("--tasks", required=True, nargs="+", choices=LOCAL_TASKS, help="which ones to make")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of tasks to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    local = settings.harness.local
    with step("multiple-choice-data", args, outputs=[args.output]) as log:
        documents, _ = read_documents(local.source, "harness.local.source")
        with atomic_folder(args.output) as folder:
            for task in tqdm(args.tasks, desc="writing questions", unit="task"):
                counts = {"train": SHOTS, "test": local.questions}
                splits = {
                    split: list(
                        questions(documents, task, split, count=count, words=local.passage_words, seed=settings.seed)
                    )
                    for split, count in counts.items()
                }
                write_task(folder, task, splits)
                words = sum(len(question.context.split()) for question in splits["test"]) / local.questions
                log.metrics({f"{task}/questions": local.questions, f"{task}/words": words})
        for task in args.tasks:
            path = args.output / f"{task}-test.jsonl"
            log.dataset(task, path, sha256_file(path))
