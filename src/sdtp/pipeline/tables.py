"""latency.csv, quality.csv and comparisons.csv from what the benchmark and evaluation jobs measured."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation.stats import (
    PairedDifference,
    holm,
    mean_interval,
    paired_difference,
    paired_ratios,
    quartiles,
    retained_loss,
    retained_share,
    wilson_interval,
)
from sdtp.pipeline.results import COMPARISON_COLUMNS, LATENCY_COLUMNS, QUALITY_COLUMNS, Cell, pairs_of

# What is reported of each task: the metric and the column of an evaluation row it is the mean of.
# The first of a task is its quality in one number; agreement with the unpruned model comes last.
TASK_METRICS = {
    "retrieval": {"accuracy": "correct", "loss": "loss", "kl": "kl", "top1": "top1"},
    "continuation": {"loss": "loss", "kl": "kl", "top1": "top1"},
    "instruction": {"loss": "loss", "kl": "kl", "top1": "top1"},
}
# Shares of right and wrong answers. A planted value has a token or a few, so that the share of them that the unpruned
# model would choose too is hardly anything between 0 and 1.
_PROPORTIONS = frozenset({("retrieval", "accuracy"), ("retrieval", "top1")})

# The value of each example, by id, of every cell.
Cells = dict[Cell, dict[str, float]]


def latency_table(benchmarks: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per arm and prompt length.

    Every job timed its own unpruned arm, interleaved with its pruned one: speedups are of times that ran side by side,
    never across jobs, and the ratio of peak memory is of one process, since processes differ in what they hold beside
    the model. The unpruned row of a length pools the repeats of all jobs.

    Args:
        benchmarks: the objects of `benchmark/ratio-*.json`, in the order of their rows in the table.

    Raises:
        UserError: a length was benchmarked by some jobs only, or twice.
    """
    by_job = [{(row["method"], row["prompt_tokens"]): row for row in job["rows"]} for job in benchmarks]
    lengths = sorted({row["prompt_tokens"] for job in benchmarks for row in job["rows"]})
    for job, rows in zip(benchmarks, by_job, strict=True):
        wanted = {(method, length) for method in ("unpruned", "sdtp") for length in lengths}
        if set(rows) != wanted or len(job["rows"]) != len(wanted):
            raise UserError(
                f"benchmark of keep ratio {job['keep_ratio']}: rows {sorted(rows)}; one of unpruned and one of sdtp is "
                f"needed for each length of {lengths}"
            )
    table = [_unpruned_latency([rows["unpruned", length] for rows in by_job]) for length in lengths]
    for job, rows in zip(benchmarks, by_job, strict=True):
        table += [
            _pruned_latency(job["keep_ratio"], rows["sdtp", length], rows["unpruned", length]) for length in lengths
        ]
    return pd.DataFrame(table, columns=LATENCY_COLUMNS)


def _times(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns that both kinds of row fill alike, over the pooled repeats of `rows`."""
    prefill = [seconds for row in rows for seconds in row["prefill_s"]]
    # With one new token there is no decode step: the lists hold null.
    decode = [seconds for row in rows for seconds in row["decode_s"] if seconds is not None]
    # Where the system cannot tell, they hold null too.
    peaks = [peak for row in rows for peak in row["peak_memory_bytes"] if peak is not None]
    low, middle, high = quartiles(prefill)
    return {
        "prompt_tokens": rows[0]["prompt_tokens"],
        "new_tokens": rows[0]["new_tokens"],
        "prefill_s": middle,
        "prefill_q25": low,
        "prefill_q75": high,
        "decode_s": statistics.median(decode) if decode else math.nan,
        "end_to_end_s": statistics.median(seconds for row in rows for seconds in row["end_to_end_s"]),
        "repeats": len(prefill),
        "prefill_tflop": rows[0]["prefill_flop"] / 1e12,
        "peak_memory_bytes": statistics.median(peaks) if peaks else math.nan,
        "kv_cache_bytes": rows[0]["kv_cache_bytes"],
        "kept_tokens": rows[0]["kept_tokens"],
        "cold_prefill_s": statistics.median(row["cold_s"] for row in rows),
    }


def _unpruned_latency(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reference: its ratios to itself are 1, and it spends nothing on choosing tokens."""
    ones = ("flop_bound", "length_bound", "prefill_speedup", "speedup_q25", "efficiency", "flop_efficiency")
    times = _times(rows)
    return {
        "method": "unpruned",
        "keep_ratio": 1.0,
        **times,
        **dict.fromkeys(ones, 1.0),
        "decode_speedup": math.nan if math.isnan(times["decode_s"]) else 1.0,
        "end_to_end_speedup": 1.0,
        "scoring_tflop": 0.0,
        "overhead_s": 0.0,
        "scoring_s": 0.0,
        "peak_memory_ratio": math.nan if math.isnan(times["peak_memory_bytes"]) else 1.0,
    }


def _pruned_latency(keep_ratio: float, row: Mapping[str, Any], unpruned: Mapping[str, Any]) -> dict[str, Any]:
    speedup_q25, speedup, _ = paired_ratios(unpruned["prefill_s"], row["prefill_s"])
    flop_bound = unpruned["prefill_flop"] / row["prefill_flop"]
    return {
        "method": "sdtp",
        "keep_ratio": keep_ratio,
        **_times([row]),
        "flop_bound": flop_bound,
        "length_bound": paired_ratios(unpruned["prefill_s"], row["ideal_s"])[1],
        "prefill_speedup": speedup,
        "speedup_q25": speedup_q25,
        "efficiency": efficiency(row)[1],
        "flop_efficiency": speedup / flop_bound,
        "decode_speedup": math.nan if None in row["decode_s"] else _speedup(unpruned, row, "decode_s"),
        "end_to_end_speedup": _speedup(unpruned, row, "end_to_end_s"),
        "scoring_tflop": row["scoring_flop"] / 1e12,
        "overhead_s": statistics.median(
            pruned - bound for pruned, bound in zip(row["prefill_s"], row["ideal_s"], strict=True)
        ),
        "scoring_s": statistics.median(row["scoring_s"]),
        "peak_memory_ratio": _memory_ratio(unpruned["peak_memory_bytes"], row["peak_memory_bytes"]),
    }


def _speedup(unpruned: Mapping[str, Any], row: Mapping[str, Any], times: str) -> float:
    return paired_ratios(unpruned[times], row[times])[1]


def _memory_ratio(unpruned: Sequence[int | None], pruned: Sequence[int | None]) -> float:
    """Median over the rounds of one job of pruned over unpruned peak; nan where one of them is not known."""
    ratios = [ours / theirs for ours, theirs in zip(pruned, unpruned, strict=True) if ours and theirs]
    return statistics.median(ratios) if ratios else math.nan


def efficiency(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Quartiles of measured speedup over length bound of a pruned benchmark row.

    Both have the same unpruned time on top, so that a repeat's ratio is its length-bound time over its pruned time.
    """
    return paired_ratios(row["ideal_s"], row["prefill_s"])


def quality_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """The evaluation rows of all jobs as one value per example and cell; seeds are averaged within the example.

    Raises:
        UserError: no unpruned rows, or a method that was run on other examples than the unpruned model.
    """
    collected: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["task"] not in TASK_METRICS:
            raise UserError(f"task {row['task']!r} of example {row['id']}: {', '.join(TASK_METRICS)} are known")
        for metric, column in TASK_METRICS[row["task"]].items():
            collected[row["task"], metric, row["method"], row["keep_ratio"]][row["id"]].append(float(row[column]))
    cells = {
        cell: {id_: math.fsum(values) / len(values) for id_, values in examples.items()}
        for cell, examples in collected.items()
    }
    for (task, metric, method, ratio), examples in cells.items():
        unpruned = cells.get((task, metric, "unpruned", 1.0), {})
        if examples.keys() != unpruned.keys():
            raise UserError(
                f"{task}: {method} at keep ratio {ratio} was evaluated on {len(examples)} examples and unpruned on "
                f"{len(unpruned)}, {len(examples.keys() & unpruned.keys())} of them shared: all must be the same"
            )
    return cells


def quality_table(cells: Cells) -> pd.DataFrame:
    """One row per cell: the mean over examples, its 95% interval, and what is left of the unpruned value.

    Rows of one task and metric stand together, methods and ratios in the order of the jobs.

    Args:
        cells: as `quality_cells` gives them.
    """
    panels = _panels(cells)
    table = []
    for (task, metric, method, ratio), examples in sorted(cells.items(), key=lambda item: panels[item[0][:2]]):
        values = list(examples.values())
        value = math.fsum(values) / len(values)
        unpruned = list(cells[task, metric, "unpruned", 1.0].values())
        baseline = math.fsum(unpruned) / len(unpruned)
        low, high = wilson_interval(values) if (task, metric) in _PROPORTIONS else mean_interval(values)
        retained = _retained(metric, value, baseline)
        table.append((task, metric, method, ratio, value, low, high, len(values), retained))
    return pd.DataFrame(table, columns=QUALITY_COLUMNS)


def _retained(metric: str, value: float, unpruned: float) -> float:
    """What is left of the unpruned value; nan of a divergence from the unpruned model, whose own is 0."""
    if metric == "kl":
        return math.nan
    return retained_loss(value, unpruned) if metric == "loss" else retained_share(value, unpruned)


def cell_difference(
    task: str, metric: str, first: Mapping[str, float], second: Mapping[str, float]
) -> PairedDifference:
    """A cell's values less another's of the same task and metric, example by example (see `quality_cells`)."""
    return paired_difference([first[id_] for id_ in second], list(second.values()), right_answer(task, metric))


def right_answer(task: str, metric: str) -> float | None:
    """The value of a right answer, of a metric that is 0 of a wrong one; None of another metric."""
    return 1.0 if (task, metric) in _PROPORTIONS else None


def comparison_table(cells: Cells) -> pd.DataFrame:
    """One row per pair of `pairs_of` the cells: mean of method minus other over the same examples, and its interval.

    `p_value` is of the pair alone, `p_holm` adjusts it for all pairs of the same task and metric.

    Args:
        cells: as `quality_cells` gives them.
    """
    panels = _panels(cells)
    table = []
    for task, metric, method, other, ratio in sorted(pairs_of(cells), key=lambda pair: panels[pair[:2]]):
        first = cells[task, metric, method, ratio]
        second = cells[task, metric, other, 1.0 if other == "unpruned" else ratio]
        pair = cell_difference(task, metric, first, second)
        table.append((task, metric, method, other, ratio, pair.mean, pair.low, pair.high, pair.p_value, pair.n))
    result = pd.DataFrame(table, columns=COMPARISON_COLUMNS[:-1])
    result["p_holm"] = result.groupby(["task", "metric"])["p_value"].transform(
        lambda family: pd.Series(holm(family.tolist()), family.index)
    )
    return result


def _panels(cells: Cells) -> dict[tuple[str, str], int]:
    """The (task, metric) of the cells and the place of each in the tables."""
    return {panel: place for place, panel in enumerate(dict.fromkeys(cell[:2] for cell in cells))}
