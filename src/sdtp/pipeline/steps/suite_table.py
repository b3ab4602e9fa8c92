"""Gathers the scores of a suite into its table and its figures."""

import argparse
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.evaluation.ruler.scoring import heat_map
from sdtp.evaluation.suite_rows import SUITES
from sdtp.pipeline import ruler_plot, suite_plot
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.plotstyle import figure_files, name_of, save
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import write_csv
from sdtp.pipeline.suite_tables import Cells, check_complete, suite_cells, suite_table, wholes


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp suite-table", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="methods and keep ratios of the suites")
    parser.add_argument("--suite", required=True, choices=SUITES, help="which one the scores are of")
    parser.add_argument("--scores", required=True, nargs="+", type=Path, metavar="JSONL", help="one a job")
    parser.add_argument("--table", required=True, type=Path, metavar="CSV", help="table to write")
    parser.add_argument(
        "--figure", required=True, type=Path, metavar="SVG", help="scores by task, to write; a PNG goes beside it"
    )
    parser.add_argument("--heat-map", type=Path, metavar="SVG", help="facts found by depth and length, likewise")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings).suites
    figures = [file for path in (args.figure, args.heat_map) if path for file in figure_files(path)]
    with step("suite-table", args, outputs=[args.table, *figures], wildcards={"suite": args.suite}) as log:
        cells = suite_cells(row for path in args.scores for row in read_jsonl(path))
        check_complete(cells, settings.methods, settings.keep_ratios)
        table = suite_table(cells)
        write_csv(table, args.table)
        save(suite_plot.suite(table), args.figure)
        if args.heat_map:
            save(ruler_plot.heat_maps(maps(cells)), args.heat_map)
        whole = wholes(table)
        several = whole["language"].nunique() > 1
        for row in whole.to_dict("records"):
            name = f"{row['method']}/{row['keep_ratio']}" + (f"/{row['language']}" if several else "")
            log.metrics({f"{name}/score": row["value"], f"{name}/compression": row["compression"]})
        for path in (args.table, *(figure.with_suffix(".png") for figure in figures)):
            log.artifact(path)


def maps(cells: Cells) -> dict[str, Any]:
    """The heat map of each method, named as the figure prints it; the unpruned model's first.

    Raises:
        UserError: no task of the scores plants a fact at a depth.
    """
    ratios = {ratio for method, ratio in cells if method != "unpruned"}
    found = {}
    for method, ratio in sorted(cells, key=lambda cell: cell[0] != "unpruned"):  # stable
        several = method != "unpruned" and len(ratios) > 1
        title = f"{name_of(method)} at {ratio:g}" if several else method
        try:
            found[title] = heat_map(cells[method, ratio].values())
        except ValueError as error:
            raise UserError(f"--heat-map: {error}") from error
    return found
