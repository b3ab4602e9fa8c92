"""Gathers the throughput of all placements and the longest prompts: two tables and a figure."""

import argparse
from pathlib import Path

from sdtp.pipeline.plotstyle import figure_files, save
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.serving import longest_table, throughput_table
from sdtp.pipeline.serving_plot import serving
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import write_csv


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp serving-tables", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="logged; the tables depend on no setting")
    parser.add_argument("--throughput", required=True, nargs="+", type=Path, metavar="JSON", help="one a placement")
    parser.add_argument("--longest", required=True, type=Path, metavar="JSON", help="longest prompts")
    parser.add_argument("--throughput-table", required=True, type=Path, metavar="CSV", help="table to write")
    parser.add_argument("--longest-table", required=True, type=Path, metavar="CSV", help="table to write")
    parser.add_argument("--figure", required=True, type=Path, metavar="SVG", help="figure to write; a PNG beside it")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    outputs = [args.throughput_table, args.longest_table, *figure_files(args.figure)]
    with step("serving-tables", args, outputs=outputs) as log:
        throughput = throughput_table(read_json(path) for path in args.throughput)
        longest = longest_table(read_json(args.longest))
        for table, path in ((throughput, args.throughput_table), (longest, args.longest_table)):
            write_csv(table, path)
            log.artifact(path)
        save(serving(throughput, longest), args.figure)
        log.artifact(args.figure.with_suffix(".png"), "figures")
        log.metric("placements_run", throughput.loc[throughput["not_run"].isna(), "placement"].nunique())
