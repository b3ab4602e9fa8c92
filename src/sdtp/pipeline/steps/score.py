"""Scores a file of predictions of a suite, without a model."""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.evaluation.suites import score_rows
from sdtp.pipeline.files import read_jsonl, write_jsonl
from sdtp.pipeline.step import step

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp score", description=__doc__)
    parser.add_argument("--settings", default="{}", metavar="JSON", help="none are needed")
    parser.add_argument("--predictions", required=True, type=Path, metavar="JSONL", help="those of `sdtp predict`")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row a prediction")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    if not args.predictions.is_file():
        raise UserError(f"--predictions: no file {args.predictions}; one that `sdtp predict` made is needed")
    with step("score", args, outputs=[args.output], wildcards={"predictions": args.predictions.stem}) as log:
        predictions = read_jsonl(args.predictions)
        if not predictions:
            raise UserError(f"{args.predictions}: no predictions; at least one is needed")
        try:
            rows = list(score_rows(predictions))
        except ValueError as error:
            raise UserError(f"{args.predictions}: {error}") from error
        write_jsonl(args.output, rows)
        for task, (value, n) in task_means(rows).items():
            log.metric(f"{task}/score", value)
            logger.info("%s: %.1f (n = %d)", task, value, n)


def task_means(rows: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Mean score and number of rows of each task, in their order."""
    own: dict[str, list[float]] = {}
    for row in rows:
        own.setdefault(row["task"], []).append(row["score"])
    return {task: (math.fsum(scores) / len(scores), len(scores)) for task, scores in own.items()}
