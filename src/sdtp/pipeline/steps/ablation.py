"""Compares the pruners of a configuration's variants: a table, the targets, a page to read and a figure."""

import argparse
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline import ablation_plot, targets
from sdtp.pipeline.ablations import TRAINING_COLUMNS, ablation_table, all_rows, arm, markdown
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import read_jsonl, write_atomically
from sdtp.pipeline.plotstyle import figure_files, save
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import check_complete, write_csv
from sdtp.pipeline.tables import quality_cells


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp ablation", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="keep ratios, methods, seeds and run")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder: which examples were due")
    parser.add_argument("--references", required=True, nargs="+", type=Path, metavar="JSONL", help="of other methods")
    parser.add_argument("--variants", required=True, nargs="+", metavar="NAME", help="the variants, in order")
    parser.add_argument(
        "--evaluations", required=True, nargs="+", type=Path, metavar="JSONL", help="all of each variant, in that order"
    )
    parser.add_argument(
        "--training", required=True, nargs="+", type=Path, metavar="JSON", help="metrics of each one's training"
    )
    parser.add_argument("--table", required=True, type=Path, metavar="CSV", help="table to write")
    parser.add_argument("--targets", required=True, type=Path, metavar="CSV", help="the first variant's, to write")
    parser.add_argument("--page", required=True, type=Path, metavar="MD", help="the same as a page to read, to write")
    parser.add_argument(
        "--figure", required=True, type=Path, metavar="SVG", help="figure to write; a PNG goes beside it"
    )
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    ratios, seeds = sorted(settings.pruning.keep_ratios, reverse=True), settings.evaluation.seeds
    with step("ablation", args, outputs=[args.table, args.targets, args.page, *figure_files(args.figure)]) as log:
        ids = load_split(args.data, "test")["id"]
        references = [row for path in args.references for row in read_jsonl(path)]
        methods = [method for method in settings.evaluation.methods if method != "sdtp"]
        check_complete(references, ["unpruned", *methods], ratios, seeds, ids)
        variants = {}
        for name, paths in by_variant(args.variants, args.evaluations, len(ratios)).items():
            variants[name] = [row for path in paths for row in read_jsonl(path)]
            try:
                check_complete(variants[name], ["sdtp"], ratios, seeds, ids)
            except UserError as error:
                raise UserError(f"variant {name}: {error}") from error
        training = {
            name: read_training(paths[0]) for name, paths in by_variant(args.variants, args.training, 1).items()
        }
        rows = all_rows(references, variants)
        cells = quality_cells(rows)
        table = ablation_table(rows, cells, training)
        write_csv(table, args.table)
        target_table = targets.target_table(cells, arm(args.variants[0]))
        write_csv(target_table, args.targets)
        with write_atomically(args.page) as temporary:
            temporary.write_text(markdown(table, target_table, settings.run), "utf-8")
        save(ablation_plot.ablation(table), args.figure)
        for row in table[table["variant"] != ""].to_dict("records"):
            name = f"{row['variant']}/{row['task']}-{row['metric']}/{row['keep_ratio']}"
            log.metric(name, row["value"])
        log.metrics({f"targets/{name}": count for name, count in targets.counts(target_table)})
        for path in (args.table, args.targets, args.page, args.figure.with_suffix(".png")):
            log.artifact(path)


def read_training(path: Path) -> dict[str, int]:
    """The `TRAINING_COLUMNS` of the metrics of a training; raises UserError where one is missing."""
    metrics = read_json(path)
    missing = [name for name in TRAINING_COLUMNS if name not in metrics]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}; accepted: the metrics that the step train writes")
    return {name: int(metrics[name]) for name in TRAINING_COLUMNS}


def by_variant(names: list[str], paths: list[Path], each: int) -> dict[str, list[Path]]:
    """The files of each variant: the first `each` paths are the first one's, and so on.

    Raises:
        UserError: another number of paths.
    """
    if len(paths) != each * len(names):
        raise UserError(f"{len(paths)} files of {len(names)} variants: {each} of each are needed")
    return {name: paths[each * index : each * (index + 1)] for index, name in enumerate(names)}
