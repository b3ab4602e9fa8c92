"""Registers the trained pruner in MLflow, and makes it the champion if it is better and faster than the present one."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import split_hash
from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.models import read_manifest
from sdtp.pipeline.packaging import save_model
from sdtp.pipeline.provenance import sha256_folder
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.results import AGREEMENT, read_latency, read_quality
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp register", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model and training settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="test examples, for their manifest")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--latency", required=True, type=Path, metavar="CSV", help="latency table")
    parser.add_argument("--quality", required=True, type=Path, metavar="CSV", help="quality table")
    parser.add_argument("--benchmarks", required=True, nargs="+", type=Path, metavar="JSON", help="timings")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="what is registered, to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("register", args, outputs=[args.output]) as log:
        manifest = read_manifest(args.model)
        evidence = {
            "pruner_sha256": sha256_folder(args.pruner),
            "weights_sha256": manifest["weights_sha256"],
            "test_sha256": split_hash(args.data, "test"),
            **measured(read_quality(args.quality), read_latency(args.latency), settings.training.keep_ratio),
            "timed_on": timed_on(args.benchmarks),
        }
        name = registered_name(manifest["source"]["ref"])
        with TemporaryDirectory() as folder:
            packaged = Path(folder, "model")
            save_model(packaged, args.pruner, model_config(manifest, args.model, settings))
            log.register(name, packaged, args.pruner, evidence)
        with write_atomically(args.output) as temporary:
            temporary.write_text(json.dumps({"name": name, **evidence}, indent=2) + "\n", "utf-8")
        log.metrics({key: evidence[key] for key in ("quality", "speed") if evidence[key] is not None})


def measured(quality: pd.DataFrame, latency: pd.DataFrame, keep_ratio: float) -> dict[str, Any]:
    """Quality and speed of the pruner, at the measured keep ratio nearest to the one it was trained at.

    Returns `quality`, the mean over tasks of the share of the unpruned value that is retained, None where no task has
    one (its unpruned value being zero), agreement with the unpruned model left out; the tasks it is of, each with n;
    `speed`, how many times faster than unpruned the longest benchmarked prompt is prefilled; the ratio and the length.

    Raises UserError where the ratio was not timed.
    """
    rows = quality[(quality["method"] == "sdtp") & ~quality["metric"].isin(AGREEMENT)]
    ratio = min(sorted(set(rows["keep_ratio"])), key=lambda one: abs(one - keep_ratio))
    rows = rows[(rows["keep_ratio"] == ratio) & rows["retained"].notna()].sort_values(["task", "metric"])
    length = latency["prompt_tokens"].max()
    timed = latency[(latency["method"] == "sdtp") & (latency["prompt_tokens"] == length)]
    speed = timed[timed["keep_ratio"] == ratio]["prefill_speedup"]
    if speed.empty:
        raise UserError(f"latency.csv: no sdtp row of keep ratio {ratio}, which quality.csv has; accepted: one in both")
    return {
        "keep_ratio": float(ratio),
        "quality": None if rows.empty else float(rows["retained"].mean()),
        "speed": float(speed.iloc[0]),
        "tasks": ", ".join(f"{row.task} {row.metric} n={row.n}" for row in rows.itertuples()),
        "prompt_tokens": int(length),
    }


def timed_on(benchmarks: Sequence[Path]) -> str:
    """The device, dtype and attention that the timings were taken with; the report checks that all agree."""
    timing = read_json(benchmarks[0])
    return f"{timing['device']}, {timing['dtype']}, {timing['attention']} attention"


def registered_name(ref: str) -> str:
    """The registered model of a language model: of hub id `a/b-7b` or file `x/b-7b.gguf` it is `sdtp-b-7b`."""
    return "sdtp-" + re.sub(r"[^\w.-]+", "-", Path(ref).name.removesuffix(".gguf"))


def model_config(manifest: dict[str, Any], model: Path, settings: Settings) -> dict[str, Any]:
    """Where the served pruner finds its language model: on the hub if it came from there, else in the run's folder."""
    source = manifest["source"]
    hub = source["kind"] == "hub"
    return {
        "model": source["ref"] if hub else str(model.resolve()),
        "revision": source["revision"] if hub else None,
        "dtype": settings.model.dtype,
        "attention": settings.model.attention,
        "trust_remote_code": manifest["trust_remote_code"],
    }
