"""Writes the report of a run: one HTML page with everything in it."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import read_jsonl, write_atomically
from sdtp.pipeline.models import load_tokenizer
from sdtp.pipeline.pruners import read_pruner
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.report import Run, render
from sdtp.pipeline.results import read_comparisons, read_history, read_latency, read_quality
from sdtp.pipeline.step import step
from sdtp.pipeline.token_view import token_texts

PACKAGES = ("sdtp", "torch", "transformers", "datasets", "safetensors", "numpy", "pandas", "matplotlib", "snakemake")


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp report", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="settings to show; run names the report")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--test-data", required=True, type=Path, metavar="DIR", help="test examples")
    parser.add_argument("--saliency", required=True, type=Path, metavar="JSON", help="index of the saliency shards")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--history", required=True, type=Path, metavar="CSV", help="learning curves")
    parser.add_argument("--generations", required=True, nargs="+", type=Path, metavar="JSONL", help="one a keep ratio")
    parser.add_argument("--latency", required=True, type=Path, metavar="CSV", help="latency table")
    parser.add_argument("--quality", required=True, type=Path, metavar="CSV", help="quality table")
    parser.add_argument("--comparisons", required=True, type=Path, metavar="CSV", help="comparison table")
    parser.add_argument("--benchmarks", required=True, nargs="+", type=Path, metavar="JSON", help="timings")
    parser.add_argument("--figures", required=True, type=Path, metavar="DIR", help="folder of the figures")
    parser.add_argument("--output", required=True, type=Path, metavar="HTML", help="report to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    with step("report", args, outputs=[args.output]) as log:
        page = render(read_run(args))
        with write_atomically(args.output) as temporary:
            temporary.write_text(page, "utf-8")
        log.metric("bytes", len(page.encode()))
        log.artifact(args.output)


def read_run(args: argparse.Namespace) -> Run:
    """Everything the report shows, from the files of `args`."""
    generations = [row for path in args.generations for row in read_jsonl(path)]
    if not generations:
        raise UserError(f"{', '.join(map(str, args.generations))}: no rows; accepted: at least one generation")
    test = load_split(args.test_data, "test").to_list()
    tests: dict[str, list[int]] = {}
    for row in test:
        tests.setdefault(row["task"], []).append(len(row["prompt_ids"]))
    # The shortest prompt: a token view of a long one is unreadable, and could break the limit on the report's size.
    shown = min(generations, key=lambda row: row["prompt_tokens"])["id"]
    ids = next((row["prompt_ids"] for row in test if row["id"] == shown), None)
    if ids is None:
        raise UserError(f"{args.test_data}: no test example {shown}, which was generated from; accepted: ids of test")
    quality = read_quality(args.quality)
    machine, warmup = timed_on(args.benchmarks)
    # What both folders say of their splits.
    data, tested = (read_json(folder / "manifest.json") for folder in (args.data, args.test_data))
    data["splits"] |= tested["splits"]
    return Run(
        settings=json.loads(args.settings),
        model=read_json(args.model / "manifest.json"),
        data=data,
        layers=read_pruner(args.pruner).schedule.layers,
        tests=tests,
        latency=read_latency(args.latency),
        quality=quality,
        comparisons=read_comparisons(args.comparisons, quality),
        history=read_history(args.history),
        generations=generations,
        shown=shown,
        tokens=token_texts(load_tokenizer(args.model), ids),
        figures={path.stem: path.read_bytes() for path in args.figures.glob("*.svg")},
        timed_on=machine,
        warmup=warmup,
        reduction=read_json(args.saliency)["reduction"],
        versions=versions(),
    )


def timed_on(benchmarks: Sequence[Path]) -> tuple[str, int]:
    """The device, dtype, attention and library versions the timings were taken with, as one line; the warm-up rounds.

    Raises:
        UserError: the files disagree: ratios timed on different machines, or otherwise, are not comparable.
    """
    facts = []
    for path in benchmarks:
        timing = read_json(path)
        parts = [timing["device"], timing["dtype"], f"{timing['attention']} attention"]
        parts += [f"{name} {number}" for name, number in timing["versions"].items()]
        facts.append((", ".join(parts), timing["warmup"]))
    for path, fact in zip(benchmarks, facts, strict=True):
        if fact != facts[0]:
            (here, rounds), (there, expected) = fact, facts[0]
            raise UserError(
                f"{path} was timed on {here} after {rounds} rounds of warm-up, {benchmarks[0]} on {there} after "
                f"{expected}; accepted: one machine and as many rounds for all"
            )
    return facts[0]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose results the report shows, and the machine."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return {"machine": machine, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
