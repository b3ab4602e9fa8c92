"""Gathers the benchmark and evaluation jobs into latency.csv, quality.csv, comparisons.csv and targets.csv."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import read_jsonl, write_atomically
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.step import step
from sdtp.pipeline.tables import comparison_table, efficiency, latency_table, quality_cells, quality_table
from sdtp.pipeline.targets import target_table


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp tables", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="keep ratios, methods, seeds and run")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder: which examples were due")
    parser.add_argument("--benchmarks", required=True, nargs="+", type=Path, metavar="JSON", help="one a keep ratio")
    parser.add_argument("--evaluations", required=True, nargs="+", type=Path, metavar="JSONL", help="one a job")
    parser.add_argument("--latency", required=True, type=Path, metavar="CSV", help="latency table to write")
    parser.add_argument("--quality", required=True, type=Path, metavar="CSV", help="quality table to write")
    parser.add_argument("--comparisons", required=True, type=Path, metavar="CSV", help="comparison table to write")
    parser.add_argument("--targets", required=True, type=Path, metavar="CSV", help="what SDTP is held to, to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    ratios = sorted(settings.pruning.keep_ratios, reverse=True)
    with step("tables", args, outputs=[args.latency, args.quality, args.comparisons, args.targets]) as log:
        benchmarks = {job["keep_ratio"]: job for job in map(read_json, args.benchmarks)}
        if sorted(benchmarks, reverse=True) != ratios:
            raise UserError(f"--benchmarks are of keep ratios {sorted(benchmarks)}: {sorted(ratios)} are needed")
        jobs = [benchmarks[ratio] for ratio in ratios]
        write_csv(latency_table(jobs), args.latency)
        for job in jobs:
            for row in job["rows"]:
                if row["method"] == "sdtp":
                    low, middle, _ = efficiency(row)
                    name = f"efficiency/{job['keep_ratio']}/{row['prompt_tokens']}"
                    log.metrics({f"{name}/median": middle, f"{name}/q25": low})

        rows = [row for path in args.evaluations for row in read_jsonl(path)]
        methods = ["unpruned", *settings.evaluation.methods]
        check_complete(rows, methods, ratios, settings.evaluation.seeds, load_split(args.data, "test")["id"])
        cells = quality_cells(rows)
        write_csv(quality_table(cells), args.quality)
        comparisons = comparison_table(cells)
        write_csv(comparisons, args.comparisons)
        for row in comparisons[comparisons["method"] == "sdtp"].to_dict("records"):
            name = f"sdtp-minus-{row['other']}/{row['task']}-{row['metric']}/{row['keep_ratio']}"
            log.metrics({f"{name}/{key}": row[key] for key in ("mean", "ci_low", "ci_high", "p_value", "p_holm")})
        write_csv(target_table(cells, "sdtp"), args.targets)
        for table in (args.latency, args.quality, args.comparisons, args.targets):
            log.artifact(table)


def check_complete(
    rows: list[dict[str, Any]],
    methods: Sequence[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    ids: Sequence[str],
) -> None:
    """Raise UserError unless `rows` are exactly those that were due, each once.

    Due are each method at each ratio, unpruned at 1.0, on each example of `ids`: once, with seed None, or, where the
    method chooses at random, once with each of `seeds`.
    """
    wanted = {(method, ratio) for method in methods for ratio in ([1.0] if method == "unpruned" else ratios)}
    found: dict[tuple[str, float], Counter[tuple[int | None, str]]] = {cell: Counter() for cell in wanted}
    for row in rows:
        found.setdefault((row["method"], row["keep_ratio"]), Counter())[row["seed"], row["id"]] += 1
    evaluated = {cell for cell, counts in found.items() if counts}
    if evaluated != wanted:
        raise UserError(f"--evaluations hold (method, keep ratio) {sorted(evaluated)}: {sorted(wanted)} are needed")
    for (method, ratio), counts in found.items():
        seeded = any(seed is not None for seed, _ in counts)
        due = Counter((seed, id_) for seed in (seeds if seeded else [None]) for id_ in ids)
        for problem, wrong in (("no row", due - counts), ("a row too many", counts - due)):
            if wrong:
                seed, id_ = next(iter(wrong))
                raise UserError(
                    f"{method} at keep ratio {ratio} has {problem} for {wrong.total()} of {due.total()} evaluations, "
                    f"example {id_!r} with seed {seed} for one: one row for each test example"
                    + (f" and each seed of {list(seeds)} is needed" if seeded else " is needed")
                )


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically; empty fields are numbers that do not exist."""
    with write_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
