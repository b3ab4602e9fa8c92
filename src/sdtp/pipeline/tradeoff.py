"""tradeoff.csv and cache-compression.csv: a method's quality beside its own measured time and memory."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation import names
from sdtp.evaluation.stats import paired_ratios, retained_share
from sdtp.pipeline.results import difference_columns, records, with_verdicts
from sdtp.pipeline.suite_tables import wholes
from sdtp.pipeline.tables import Cells, cell_difference, quality_cells, quality_table

logger = logging.getLogger(__name__)

# fmt: off
TRADEOFF_COLUMNS = [
    "method", "keep_ratio", "task", "metric", "value", "low", "high", "n", "retained", "difference", "difference_low",
    "difference_high", "quality_tokens", "from_prefill", "model", "stages", "timed_tokens", "repeats",
    "prefill_speedup", "speedup_q25", "speedup_q75",
    "decode_speedup", "end_to_end_speedup", "flop_bound", "peak_memory_bytes", "unpruned_peak_memory_bytes",
    "memory_difference_bytes", "memory_difference_low", "memory_difference_high", "kv_cache_bytes",
    "unpruned_kv_cache_bytes",
]
COMPRESSION_COLUMNS = [
    "base", "rule", "method", "keep_ratio", "task", "metric", "value", "low", "high", "n", "difference",
    "difference_low", "difference_high", "p_value", "p_holm", "verdict", "timed_tokens", "kv_cache_bytes",
    "cache_share", "prefill_speedup", "decode_speedup", "end_to_end_speedup", "peak_memory_bytes",
]
# fmt: on

# Of an evaluation: method and keep ratio.
Arm = tuple[str, float]


@dataclass(frozen=True)
class Timed:
    """What one method's timing job measured.

    Attributes:
        method, keep_ratio: which.
        model: its name, as the configuration has it.
        stages: the decoder layers that tokens are removed before, in words; empty where there are none.
        rows: prompt length -> the unpruned model's row and the method's own, measured side by side.
    """

    method: str
    keep_ratio: float
    model: str
    stages: str
    rows: Mapping[int, tuple[Mapping[str, Any], Mapping[str, Any]]]


def read_timed(content: Mapping[str, Any], where: str) -> Timed:
    """The object of a file of `timings/`.

    Raises:
        UserError: a length does not have one row of the unpruned model and one of the method.
    """
    method = content["method"]
    by_length: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in content["rows"]:
        by_length.setdefault(row["prompt_tokens"], {})[row["method"]] = row
    for length, rows in by_length.items():
        if rows.keys() != {"unpruned", method}:
            raise UserError(f"{where}: rows of {sorted(rows)} at {length} tokens; unpruned and {method} are needed")
    stages = " ".join(map(str, content["stages"]))
    pairs = {length: (rows["unpruned"], rows[method]) for length, rows in by_length.items()}
    return Timed(method, content["keep_ratio"], content["model"], stages, pairs)


def tradeoff_table(
    rows: Sequence[Mapping[str, Any]], timings: Sequence[Timed], suites: Sequence[pd.DataFrame] = ()
) -> pd.DataFrame:
    """Each quality cell with the speed and the memory of the same method and keep ratio: a row a timed length.

    The oracle, which no clock can be held to, has quality alone. A difference is to the unpruned model on the same
    examples, with its 95% interval. A speedup is the median of paired ratios, over the unpruned model's passes of the
    same job. The unpruned row has the median memory of all jobs of this environment.

    Args:
        rows: evaluation rows of the unpruned model and of the methods.
        timings: of each of these methods at each of its keep ratios.
        suites: tables of suites, whose whole scores come last, those of methods and keep ratios that were timed; a
            warning names the others.

    Raises:
        UserError: a method was evaluated and not timed, or jobs timed other lengths.
    """
    cells = quality_cells(rows)
    table = quality_table(cells).rename(columns={"ci_low": "low", "ci_high": "high"})
    timed = {(one.method, one.keep_ratio): one for one in timings}
    lengths = _common_lengths(timings)
    untimed = [arm for arm in _arms(cells) if arm not in timed and arm[0] not in ("unpruned", "oracle")]
    if untimed:
        raise UserError(
            f"timings: {', '.join(_named(*arm) for arm in untimed)} was evaluated and not timed; one timing of each "
            "is needed"
        )
    about = _about_quality(rows)
    own = [one for one in timings if not one.method.startswith("kvpress-")] or list(timings)
    speeds: dict[Arm, list[dict[str, Any]]] = {
        arm: [
            {"model": one.model, "stages": one.stages, "timed_tokens": length, **_speed(*one.rows[length])}
            for length in lengths
        ]
        for arm, one in timed.items()
    }
    speeds["unpruned", 1.0] = [
        {"model": own[0].model, "timed_tokens": length, **_unpruned_speed([one.rows[length][0] for one in own])}
        for length in lengths
    ]
    joined = []
    for cell in records(table):
        arm = cell["method"], cell["keep_ratio"]
        panel = cell["task"], cell["metric"]
        values, unpruned = cells[*panel, *arm], cells[*panel, "unpruned", 1.0]
        change = difference_columns(None if values is unpruned else cell_difference(*panel, values, unpruned))
        for speed in speeds.get(arm, [{}]):  # nothing but quality is the oracle's
            joined.append({**cell, **change, **about[cell["task"], *arm], **speed})
    left = []
    for cell in (cell for suite in suites for cell in _whole_scores(suite)):
        arm = cell["method"], cell["keep_ratio"]
        if arm not in speeds:
            left.append(_named(*arm))
        joined += [{**cell, **speed} for speed in speeds.get(arm, [])]
    if left:
        logger.warning("suites: %s: not timed, and so left out", ", ".join(dict.fromkeys(left)))
    return pd.DataFrame(joined, columns=TRADEOFF_COLUMNS)


def _whole_scores(suite: pd.DataFrame) -> list[dict[str, Any]]:
    """The scores over all of a suite as cells of quality: its name, with the language where it is Chinese, is the task.

    What share of the answers the prefill predicted is not known.
    """
    whole = wholes(suite).assign(language=suite["language"].astype(object).fillna(""))
    unpruned = whole[whole["method"] == "unpruned"].set_index("language")["value"]
    return [
        {
            **row,
            "task": f"{row['suite']}-zh" if row["language"] == "zh" else row["suite"],
            "metric": "score",
            "retained": retained_share(row["value"], unpruned[row["language"]]),
            "quality_tokens": row["prompt_tokens"],
        }
        for row in records(whole)
    ]


def compression_table(rows: Sequence[Mapping[str, Any]], timings: Sequence[Timed]) -> pd.DataFrame:
    """Cache compression on top of the unpruned and of the pruned model, after the paper's Table 6.

    The first token of a response comes from the prefill, before anything is compressed. Only responses of two tokens or
    more count, hence; `n` says how many there are. A difference is to the same base without compression, on the same
    examples; its p-value is also adjusted for all comparisons of the task and metric.

    Args:
        rows: evaluation rows of the unpruned model, of `sdtp`, and of both with rules on top.
        timings: of all of these but the unpruned model.

    Raises:
        UserError: no method with a rule on top, or a base that was not evaluated.
    """
    cells = quality_cells(_of_two_tokens(rows))
    timed = {(one.method, one.keep_ratio): one for one in timings}
    length = min(_common_lengths(timings), key=lambda tokens: abs(tokens - _typical_tokens(rows)))
    quality = {
        (row["task"], row["metric"], row["method"], row["keep_ratio"]): row for row in records(quality_table(cells))
    }
    found = []
    for (task, metric, method, ratio), row in quality.items():
        base, rule = names.parts(method)
        tops = {names.parts(other)[0] for other, own in timed if own == ratio and names.parts(other)[1]}
        if base not in tops:  # nothing was put on top of it
            continue
        values, below = cells[task, metric, method, ratio], cells.get((task, metric, base, ratio))
        if below is None:
            raise UserError(f"evaluations: {method} at keep ratio {ratio} has no {base} to be compared with")
        change = cell_difference(task, metric, values, below) if rule else None
        reference = next(one.rows[length][0] for one in timings)
        speed = _unpruned_speed([reference]) if method == "unpruned" else _speed(*timed[method, ratio].rows[length])
        found.append(
            {
                **row,
                "base": base,
                "rule": rule or "none",
                "low": row["ci_low"],
                "high": row["ci_high"],
                **difference_columns(change),
                "timed_tokens": length,
                "cache_share": speed["kv_cache_bytes"] / reference["kv_cache_bytes"],
                **speed,
            }
        )
    if not found:
        raise UserError("evaluations: no cache was compressed on top of another method; sdtp+h2o, for one, is needed")
    panels = list(dict.fromkeys((row["task"], row["metric"]) for row in found))
    # The unpruned model first, and below each base what is on top of it.
    found.sort(
        key=lambda row: (
            panels.index((row["task"], row["metric"])),
            row["base"] != "unpruned",
            -row["keep_ratio"],
            row["rule"] != "none",
        )
    )
    return with_verdicts(pd.DataFrame(found), ["task", "metric"])[COMPRESSION_COLUMNS]


def _of_two_tokens(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose response has a token after the first; a task where hardly any has is left out, and warned of."""
    kept = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task and row["response_tokens"] >= 2]
        examples = {row["id"] for row in own}
        if len(examples) < 2:
            logger.warning("%s: %d responses of two tokens or more, which compare nothing", task, len(examples))
        else:
            kept += own
    return kept


def _arms(cells: Cells) -> list[Arm]:
    return list(dict.fromkeys((method, ratio) for _, _, method, ratio in cells))


def _named(method: str, ratio: float) -> str:
    return f"{method} at keep ratio {ratio}"


def _common_lengths(timings: Sequence[Timed]) -> list[int]:
    if not timings:
        raise UserError("timings: none; one of each method is needed")
    lengths = sorted(timings[0].rows)
    for one in timings:
        if sorted(one.rows) != lengths:
            raise UserError(
                f"timings: {one.method} at keep ratio {one.keep_ratio} was timed at {sorted(one.rows)} tokens and "
                f"{timings[0].method} at {lengths}: all must be the same"
            )
    return lengths


def _typical_tokens(rows: Iterable[Mapping[str, Any]]) -> float:
    return statistics.median(row["prompt_tokens"] for row in rows)


def _about_quality(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, float], dict[str, float]]:
    """Of each task and arm the median prompt, and how much of the responses the uncompressed prefill gave."""
    found: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["method"], row["keep_ratio"]), []).append(row)
    return {
        key: {
            "quality_tokens": _typical_tokens(own),
            "from_prefill": _from_prefill(own) if names.compresses(key[1]) else 0.0,
        }
        for key, own in found.items()
    }


def _from_prefill(rows: Sequence[Mapping[str, Any]]) -> float:
    """The larger of two shares: of tokens that are a response's first, and of responses that are this one alone."""
    tokens = [row["response_tokens"] for row in rows]
    return max(len(tokens) / sum(tokens), tokens.count(1) / len(tokens))


def _speed(unpruned: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    low, middle, high = paired_ratios(unpruned["prefill_s"], row["prefill_s"])
    decoded = None not in row["decode_s"] and None not in unpruned["decode_s"]
    flop = row.get("prefill_flop")
    pairs = list(zip(_measured(row["peak_memory_bytes"]), _measured(unpruned["peak_memory_bytes"]), strict=True))
    differences = [own - theirs for own, theirs in pairs] or [math.nan]
    return {
        "repeats": len(row["prefill_s"]),
        "prefill_speedup": middle,
        "speedup_q25": low,
        "speedup_q75": high,
        "decode_speedup": paired_ratios(unpruned["decode_s"], row["decode_s"])[1] if decoded else math.nan,
        "end_to_end_speedup": paired_ratios(unpruned["end_to_end_s"], row["end_to_end_s"])[1],
        "flop_bound": math.nan if flop is None else unpruned["prefill_flop"] / flop,
        "peak_memory_bytes": statistics.median([own for own, _ in pairs] or [math.nan]),
        "unpruned_peak_memory_bytes": statistics.median([theirs for _, theirs in pairs] or [math.nan]),
        "memory_difference_bytes": statistics.median(differences),
        "memory_difference_low": min(differences),
        "memory_difference_high": max(differences),
        "kv_cache_bytes": row["kv_cache_bytes"],
        "unpruned_kv_cache_bytes": unpruned["kv_cache_bytes"],
    }


def _unpruned_speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reference: its ratios to itself are 1."""
    peak = statistics.median([peak for row in rows for peak in _measured(row["peak_memory_bytes"])] or [math.nan])
    ratios = ("prefill_speedup", "speedup_q25", "speedup_q75", "end_to_end_speedup", "flop_bound")
    return {
        "repeats": len(rows[0]["prefill_s"]),
        **dict.fromkeys(ratios, 1.0),
        "decode_speedup": math.nan if None in rows[0]["decode_s"] else 1.0,
        "peak_memory_bytes": peak,
        "unpruned_peak_memory_bytes": peak,
        **dict.fromkeys(("memory_difference_bytes", "memory_difference_low", "memory_difference_high"), 0.0),
        "kv_cache_bytes": rows[0]["kv_cache_bytes"],
        "unpruned_kv_cache_bytes": rows[0]["kv_cache_bytes"],
    }


def _measured(peaks: Sequence[float | None]) -> list[float]:
    """Of a row's peaks those that the system could tell: all or none."""
    return [peak for peak in peaks if peak is not None]
