"""Gathers the answers to multiple-choice tasks of lm-evaluation-harness into a table and a figure."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sdtp.evaluation.names import PAPER_TASKS
from sdtp.pipeline import suite_plot
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.plotstyle import figure_files, save
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import write_csv
from sdtp.pipeline.suite_tables import ALL, PAPER, check_complete, suite_cells, suite_table


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp harness-table", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="methods and keep ratios of harness")
    parser.add_argument("--scores", required=True, nargs="+", type=Path, metavar="JSONL", help="one a job")
    parser.add_argument("--table", required=True, type=Path, metavar="CSV", help="table to write")
    parser.add_argument(
        "--figure", required=True, type=Path, metavar="SVG", help="figure to write; a PNG goes beside it"
    )
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings).harness
    with step("harness-table", args, outputs=[args.table, *figure_files(args.figure)]) as log:
        rows = [row for path in args.scores for row in read_jsonl(path)]
        table = harness_table(rows, settings.methods, settings.keep_ratios)
        write_csv(table.drop(columns=["language", "length"]), args.table)
        save(suite_plot.suite(table), args.figure)
        for row in table[table["task"] == ALL].to_dict("records"):
            name = f"{row['method']}/{row['keep_ratio']}/{row['category']}"
            log.metrics({f"{name}/accuracy": row["value"], f"{name}/kept_share": row["kept_share"]})
        for path in (args.table, args.figure.with_suffix(".png")):
            log.artifact(path)


def harness_table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], ratios: Sequence[float]) -> pd.DataFrame:
    """`suite_table` of the tasks and of each category's mean, with what guessing would score and the share kept.

    Categories are `paper`, the paper's tasks, `local`, the project's own, and `lm-eval`, all others. A mean over
    them all would be of no benchmark, and there is none.

    Args:
        rows: of `sdtp harness`, all jobs.
        methods, ratios: which they have to be of, beside the unpruned model.

    Raises:
        UserError: other rows than were due.
    """
    rows = [{**row, "category": PAPER if row["task"] in PAPER_TASKS else row["category"]} for row in rows]
    cells = suite_cells(rows)
    check_complete(cells, methods, ratios)
    table = suite_table(cells)
    table = table[table["category"] != ALL]
    asked = pd.DataFrame(
        [{name: row[name] for name in ("category", "task")} | {"chance": 100 / row["choices"]} for row in rows]
    )
    chances = asked.groupby(["category", "task"])["chance"].mean()
    means = chances.groupby("category").mean()
    own = [
        means[row["category"]] if row["task"] == ALL else chances[row["category"], row["task"]]
        for row in table.to_dict("records")
    ]
    return table.assign(chance=own, kept_share=1 / table["compression"])
