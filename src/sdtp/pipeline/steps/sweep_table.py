"""Gathers the sweep over one stage's layer, and that over the number of stages: a table and a figure of each."""

import argparse
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.plotstyle import figure_files, save
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import write_csv
from sdtp.pipeline.sweep_cells import count_cells, position_cells
from sdtp.pipeline.sweep_plot import sweep
from sdtp.pipeline.sweeps import check_complete, first_of_each_task, sweep_table


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp sweep-table", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="sweep settings, and the run's layers")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder: which examples were due")
    parser.add_argument("--unpruned", required=True, type=Path, metavar="JSONL", help="the unpruned model's evaluation")
    parser.add_argument("--evaluations", required=True, nargs="+", type=Path, metavar="JSONL", help="one a cell")
    parser.add_argument(
        "--position", required=True, type=Path, metavar="CSV", help="table by one stage's layer to write"
    )
    parser.add_argument(
        "--position-figure", required=True, type=Path, metavar="SVG", help="its figure; a PNG beside it"
    )
    parser.add_argument("--count", required=True, type=Path, metavar="CSV", help="table by number of stages to write")
    parser.add_argument("--count-figure", required=True, type=Path, metavar="SVG", help="its figure; a PNG beside it")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    outputs = [args.position, args.count, *figure_files(args.position_figure), *figure_files(args.count_figure)]
    with step("sweep-table", args, outputs=outputs) as log:
        test = load_split(args.data, "test").select_columns(["id", "task"]).to_list()
        ids = [example["id"] for example in first_of_each_task(test, settings.sweep.examples)]
        # The run has evaluated the unpruned model already, on these examples and more.
        unpruned = [row for row in read_jsonl(args.unpruned) if row["id"] in set(ids)]
        if [row["id"] for row in unpruned] != ids or {row["method"] for row in unpruned} != {"unpruned"}:
            raise UserError(f"{args.unpruned}: one row of method unpruned for each of {len(ids)} examples is needed")
        rows = [row for path in args.evaluations for row in read_jsonl(path)]
        positions, counts = position_cells(settings.sweep), count_cells(settings.sweep, settings.pruning)
        check_complete(rows, {*positions, *counts}, ids)
        for name, cells, path, figure in (
            ("layers", positions, args.position, args.position_figure),
            ("stages", counts, args.count, args.count_figure),
        ):
            table = sweep_table(unpruned, rows, cells)
            write_csv(table, path)
            save(sweep(table, name), figure)
            for row in table[table["method"] == "sdtp"].to_dict("records"):
                cell = f"{name}-{row[name]}/{row['task']}-{row['metric']}/{row['keep_ratio']}"
                log.metric(cell, row["difference"])
            for written in (path, figure.with_suffix(".png")):
                log.artifact(written)
