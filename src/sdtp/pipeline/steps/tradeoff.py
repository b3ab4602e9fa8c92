"""Sets each method's quality beside its own measured speed and memory: tables and figures."""

import argparse
from pathlib import Path

from sdtp.evaluation import names
from sdtp.pipeline import tradeoff_plot
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.plotstyle import figure_files, save
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.results import read_table
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import write_csv
from sdtp.pipeline.suite_tables import SUITE_COLUMNS
from sdtp.pipeline.tradeoff import Timed, compression_table, read_timed, tradeoff_table


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp tradeoff", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="logged; the tables depend on no setting")
    parser.add_argument("--evaluations", required=True, nargs="+", type=Path, metavar="JSONL", help="one a job")
    parser.add_argument("--timings", required=True, nargs="+", type=Path, metavar="JSON", help="one a method and ratio")
    parser.add_argument(
        "--suites", nargs="+", default=[], type=Path, metavar="CSV", help="tables of suites, whose scores to set beside"
    )
    parser.add_argument("--table", required=True, type=Path, metavar="CSV", help="trade-off to write")
    parser.add_argument("--compression", type=Path, metavar="CSV", help="cache compression on top of others to write")
    parser.add_argument(
        "--figures", required=True, type=Path, metavar="DIR", help="folder of the figures, which are named as the table"
    )
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    figures = {args.table.stem: tradeoff_plot.tradeoff, f"{args.table.stem}-memory": tradeoff_plot.memory}
    outputs = [args.table, *([args.compression] if args.compression else [])]
    outputs += [file for name in figures for file in figure_files(args.figures / name)]
    with step("tradeoff", args, outputs=outputs) as log:
        rows = [row for path in args.evaluations for row in read_jsonl(path)]
        timings = [read(path) for path in args.timings]
        table = tradeoff_table(rows, timings, [read_table(path, SUITE_COLUMNS) for path in args.suites])
        tables = {args.table: table}
        if args.compression:
            tables[args.compression] = compression_table(rows, timings)
        for path, content in tables.items():
            write_csv(content, path)
            log.artifact(path)
        drawn = table[~table["method"].map(names.unpruned_ratio) | (table["method"] == "unpruned")]
        for name, draw in figures.items():
            save(draw(drawn), args.figures / name)
            log.artifact(args.figures / f"{name}.png", "figures")
        log.metric("rows", len(table))


def read(path: Path) -> Timed:
    """A file of `timings/`."""
    return read_timed(read_json(path), str(path))
