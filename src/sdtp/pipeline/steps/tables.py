"""Gathers the benchmark and evaluation jobs into latency.csv and quality.csv."""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import load_split
from sdtp.pipeline.files import read_jsonl, write_atomically
from sdtp.pipeline.step import step
from sdtp.pipeline.tables import against_baselines, efficiency, latency_table, quality_cells, quality_table


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp tables", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="keep ratios, methods and run")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder: which examples were due")
    parser.add_argument("--benchmarks", required=True, nargs="+", type=Path, metavar="JSON", help="one a keep ratio")
    parser.add_argument("--evaluations", required=True, nargs="+", type=Path, metavar="JSONL", help="one a job")
    parser.add_argument("--latency", required=True, type=Path, metavar="CSV", help="latency table to write")
    parser.add_argument("--quality", required=True, type=Path, metavar="CSV", help="quality table to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    ratios = sorted(settings.pruning.keep_ratios, reverse=True)
    with step("tables", args, outputs=[args.latency, args.quality]) as log:
        benchmarks = {job["keep_ratio"]: job for job in (json.loads(path.read_text()) for path in args.benchmarks)}
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
        check_complete(rows, ["unpruned", *settings.evaluation.methods], ratios, load_split(args.data, "test")["id"])
        cells = quality_cells(rows)
        write_csv(quality_table(cells), args.quality)
        for (task, metric, method, ratio), difference in against_baselines(cells).items():
            name = f"sdtp-minus-{method}/{task}-{metric}/{ratio}"
            log.metrics(
                {
                    f"{name}/mean": difference.mean,
                    f"{name}/ci_low": difference.low,
                    f"{name}/ci_high": difference.high,
                    f"{name}/p_value": difference.p_value,
                }
            )
        log.artifact(args.latency)
        log.artifact(args.quality)


def check_complete(rows: list[dict[str, Any]], methods: list[str], ratios: list[float], ids: list[str]) -> None:
    """Raise UserError unless `rows` hold each method at each ratio, unpruned at 1.0, on exactly the examples `ids`."""
    wanted = {(method, ratio) for method in methods for ratio in ([1.0] if method == "unpruned" else ratios)}
    due = set(ids)
    evaluated: dict[tuple[str, float], set[str]] = {}
    for row in rows:
        evaluated.setdefault((row["method"], row["keep_ratio"]), set()).add(row["id"])
    if set(evaluated) != wanted:
        raise UserError(f"--evaluations hold (method, keep ratio) {sorted(evaluated)}: {sorted(wanted)} are needed")
    for (method, ratio), examples in evaluated.items():
        if examples != due:
            raise UserError(
                f"{method} at keep ratio {ratio} was evaluated on {len(examples)} examples, {len(examples & due)} of "
                f"the {len(due)} test examples: exactly those are needed"
            )


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically; empty fields are numbers that do not exist."""
    with write_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
