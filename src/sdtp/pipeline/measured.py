"""What a finished run measured of one method, read and checked: the cost at each length, and the quality kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation.names import BASELINES
from sdtp.evaluation.recommendation import UNPRUNED, Cost, Kept, kept_loss, kept_share
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.results import read_latency
from sdtp.pipeline.tables import TASK_METRICS, quality_cells
from sdtp.pruning import flops, store
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorer import Scorer

ROW_KEYS = {"id", "task", "prompt_tokens", "kept_tokens", "correct", "loss", "kl", "top1", "method", "keep_ratio"}

# What a setting can be recommended of: those that prune at the same stages, where `sdtp` was timed.
METHODS = ("sdtp", *BASELINES)

# Method and keep ratio.
Arm = tuple[str, float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run holds of one method.

    Attributes:
        costs: by method and keep ratio, `UNPRUNED` at 1.0 and the method at each; a length each.
        kept: by the same, and by task.
        quality_tokens: shortest and longest prompt that quality was measured on.
        benchmarks: the files of the timings.
        doubts: what a reader has to know, in sentences.
    """

    costs: dict[Arm, list[Cost]]
    kept: dict[Arm, dict[str, Kept]]
    quality_tokens: tuple[int, int]
    benchmarks: list[Path]
    doubts: list[str]


def read(run: Path, method: str, task: str | None = None) -> Measured:
    """Everything that counts of one method, read and checked.

    Args:
        run: the run's folder.
        method: what prunes.
        task: the one whose quality counts; None for all.

    Raises:
        UserError: a file is missing, named with the command that makes it; a table or a row is incomplete; timings or
            evaluations are of another pruner than the run's.
    """
    latency = read_latency(_existing(run, "tables/latency.csv"))
    ratios = sorted(latency[latency["method"] == "sdtp"]["keep_ratio"].unique().tolist(), reverse=True)
    benchmarks = [_existing(run, f"benchmark/ratio-{ratio}.json") for ratio in ratios]
    paths = [_existing(run, f"evaluation/{name}.jsonl") for name in _cells(run, method, ratios)]
    rows = [row for path in paths for row in _rows(path)]
    pruner = _existing(run, f"pruner/{store.SETTINGS}")
    try:
        schedule, scorer, _ = store.load(pruner.parent)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    _check_timed(run, latency, schedule, scorer)
    _check_evaluated(run, rows, schedule)
    # What another training of the same shape gave shows in no number: only in when the files were written.
    trained = pruner.stat().st_mtime
    older = [path for path in paths[1:] if method == "sdtp" and path.stat().st_mtime < trained]
    doubts = [f"{path} is older than the pruner, and may be of another: see `snakemake -n`" for path in older[:1]]
    lengths = [row["prompt_tokens"] for row in rows if task in (None, row["task"])]
    if not lengths:
        raise UserError(f"--task {task}: run {run} evaluated {', '.join(sorted({row['task'] for row in rows}))}")
    return Measured(_costs(latency, method), _kept(rows, task), (min(lengths), max(lengths)), benchmarks, doubts)


def _cells(run: Path, method: str, ratios: Sequence[float]) -> list[str]:
    """The evaluations that are needed; UserError where the method was never evaluated."""
    there = {path.stem.rpartition("-")[0] for path in (run / "evaluation").glob("*.jsonl")} - {UNPRUNED, "oracle"}
    if there and method not in there:
        known = [name for name in METHODS if name in there]
        raise UserError(f"--method {method}: run {run} evaluated {', '.join(known)}; accepted: one of these")
    return [f"{UNPRUNED}-1.0", *(f"{method}-{ratio}" for ratio in ratios)]


def _existing(run: Path, name: str) -> Path:
    if not (run / name).is_file():
        raise UserError(f"{run / name}: no such file; `{command(run, name)}` makes it")
    return run / name


def command(run: Path, name: str, *more: str) -> str:
    """What makes a file of a run; `more` configuration files are laid over the run's own.

    A run's folder does not say which file configured it: that of its name is meant where the repository has one.
    """
    folder = run.resolve()
    own, repository = folder.name, folder.parent.parent
    named = [name for name in (f"config/{own}.yaml", f"config/paper/{own}.yaml") if (repository / name).is_file()]
    files = [*([] if own == "default" else [*named, "YOUR.yaml"][:1]), *more]
    option = f" --configfile {' '.join(files)}" if files else ""
    return f".venv/bin/snakemake results/{own}/{name} --cores all{option}"


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for row in rows:
        if not row.keys() >= ROW_KEYS:
            raise UserError(f"{path}: a row without {', '.join(sorted(ROW_KEYS - row.keys()))}; accepted: all of these")
    if not rows:
        raise UserError(f"{path}: no rows; accepted: one an example")
    return rows


def _check_timed(run: Path, latency: pd.DataFrame, schedule: PruningSchedule, scorer: Scorer) -> None:
    """Timings must be of a pruner that keeps as many tokens and computes as much: its weights do not matter to them."""
    for row in latency[latency["method"] == "sdtp"].to_dict("records"):
        own, length = schedule.with_ratio(row["keep_ratio"]), int(row["prompt_tokens"])
        scoring = flops.scoring(length, own, scorer) / 1e12
        for what, found, expected in (
            ("kept tokens", row["kept_tokens"], own.surviving(length)[-1]),
            ("TFLOP of scoring", row["scoring_tflop"], scoring),
        ):
            if not math.isclose(found, expected, rel_tol=1e-6):
                raise UserError(
                    f"{run / 'tables/latency.csv'} was timed with another pruner than {run / 'pruner'}: at keep ratio "
                    f"{row['keep_ratio']} and {length} tokens {found:g} {what}, not {expected:g}; "
                    f"`{command(run, 'tables/latency.csv')} --forcerun benchmark` times this one"
                )


def _check_evaluated(run: Path, rows: list[dict[str, Any]], schedule: PruningSchedule) -> None:
    for row in rows:
        tokens = row["prompt_tokens"]
        pruned = row["method"] != UNPRUNED
        expected = schedule.with_ratio(row["keep_ratio"]).surviving(tokens)[-1] if pruned else tokens
        if row["kept_tokens"] != expected:
            name = f"evaluation/{row['method']}-{row['keep_ratio']}.jsonl"
            raise UserError(
                f"{run / name} is of another schedule than {run / 'pruner'}: of {tokens} tokens {row['kept_tokens']} "
                f"were kept, not {expected}; `{command(run, name)} --forcerun evaluate` evaluates this one"
            )


def _costs(latency: pd.DataFrame, method: str) -> dict[Arm, list[Cost]]:
    """Every method that keeps as many tokens leaves the model the same work: `method` has the rows of SDTP."""
    costs: dict[Arm, list[Cost]] = {}
    for row in latency[latency["method"].isin([UNPRUNED, "sdtp"])].to_dict("records"):
        cost = Cost(
            prompt_tokens=int(row["prompt_tokens"]),
            ttft_s=row["prefill_s"],
            ttft_q25=row["prefill_q25"],
            ttft_q75=row["prefill_q75"],
            ttft_ratio=1 / row["prefill_speedup"],
            ttft_ratio_q75=1 / row["speedup_q25"],
            peak_memory_bytes=row["peak_memory_bytes"],
            kv_cache_bytes=row["kv_cache_bytes"],
            repeats=int(row["repeats"]),
        )
        arm = UNPRUNED if row["method"] == UNPRUNED else method, row["keep_ratio"]
        costs.setdefault(arm, []).append(cost)
    return costs


def _kept(rows: list[dict[str, Any]], task: str | None) -> dict[Arm, dict[str, Kept]]:
    """What each task keeps, in the first of the metrics that are reported of it."""
    kept: dict[Arm, dict[str, Kept]] = {}
    cells = quality_cells(rows)
    for (name, metric, method, ratio), examples in cells.items():
        if task not in (None, name) or metric != next(iter(TASK_METRICS[name])):
            continue
        unpruned = cells[name, metric, UNPRUNED, 1.0]
        if metric == "accuracy" and not any(unpruned.values()):
            raise UserError(
                f"{name}: the unpruned model answers none of {len(unpruned)} examples, of which no share can be kept; "
                "name another --task"
            )
        if method == UNPRUNED:
            found = Kept(1.0, 1.0, 1.0, len(unpruned))
        else:
            compare = kept_share if metric == "accuracy" else kept_loss
            found = compare([examples[id_] for id_ in unpruned], list(unpruned.values()))
        kept.setdefault((method, ratio), {})[name] = found
    return kept
