"""throughput.csv and longest-prompt.csv: what pruning changes for many requests, over devices, and in what fits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation.stats import paired_ratios

# fmt: off
THROUGHPUT_COLUMNS = [
    "placement", "devices", "batch", "method", "keep_ratio", "prompt_tokens", "new_tokens", "requests", "repeats",
    "prefill_s", "decode_s", "end_to_end_s", "requests_per_s", "new_tokens_per_s", "prompt_tokens_per_s",
    "prefill_speedup", "decode_speedup", "end_to_end_speedup", "speedup_q25", "speedup_q75",
    "prefill_over_one", "decode_over_one", "end_to_end_over_one", "over_one_q25", "over_one_q75", "not_run",
]
LONGEST_COLUMNS = [
    "method", "keep_ratio", "memory_limit", "new_tokens", "longest_prompt", "over_unpruned", "peak_memory_bytes",
    "at_context_limit",
]
# fmt: on
PARTS = ("prefill", "decode", "end_to_end")
# The unpruned model on one of the placement's devices, timed in the same job.
ONE_DEVICE = "one-device"


def throughput_table(contents: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A row of each arm of each placement and batch size, or one that says why a placement was not run.

    Speedups are medians of paired ratios of passes that ran side by side: `*_speedup` over the unpruned model on the
    same placement, `*_over_one` over the unpruned model on one device of it. The quartiles are those of end to end.
    Rates count all requests of a pass over its whole time.

    Args:
        contents: objects of the files of `throughput/`, in the order of the rows.

    Raises:
        UserError: a placement and batch size has no row of the unpruned model.
    """
    found: list[dict[str, Any]] = []
    for content in contents:
        where = {"placement": content["placement"], "devices": content["devices"]}
        if content["not_run"] is not None:
            found.append({**where, "not_run": content["not_run"]})
        for batch in dict.fromkeys(row["batch"] for row in content["rows"]):
            rows = {(row["method"], row["keep_ratio"]): row for row in content["rows"] if row["batch"] == batch}
            unpruned = rows.get(("unpruned", 1.0))
            if unpruned is None:
                raise UserError(f"{content['placement']}, batches of {batch}: no row of the unpruned model")
            one = unpruned if content["placement"] == "one" else rows.get((ONE_DEVICE, 1.0))
            found += [{**where, **_rates(row), **_over(row, unpruned, one)} for row in rows.values()]
    return pd.DataFrame(found, columns=THROUGHPUT_COLUMNS)


def _rates(row: Mapping[str, Any]) -> dict[str, Any]:
    """Median times of an arm, and what is done in a second of them."""
    medians = {f"{part}_s": _median(row[f"{part}_s"]) for part in PARTS}
    requests, seconds = row["requests"], medians["end_to_end_s"]
    names = ("method", "keep_ratio", "batch", "prompt_tokens", "new_tokens", "requests")
    return {
        **{name: row[name] for name in names},
        "repeats": len(row["end_to_end_s"]),
        **medians,
        "requests_per_s": requests / seconds,
        "new_tokens_per_s": requests * row["new_tokens"] / seconds,
        "prompt_tokens_per_s": requests * row["prompt_tokens"] / medians["prefill_s"],
    }


def _over(row: Mapping[str, Any], unpruned: Mapping[str, Any], one: Mapping[str, Any] | None) -> dict[str, float]:
    """Speedups over the unpruned model on the same placement and, where that fits, on one device."""
    found: dict[str, float] = {}
    for part in PARTS:
        found[f"{part}_speedup"] = _ratios(unpruned, row, part)[1]
        found[f"{part}_over_one"] = math.nan if one is None else _ratios(one, row, part)[1]
    found["speedup_q25"], _, found["speedup_q75"] = _ratios(unpruned, row, "end_to_end")
    if one is not None:
        found["over_one_q25"], _, found["over_one_q75"] = _ratios(one, row, "end_to_end")
    return found


def _ratios(slow: Mapping[str, Any], fast: Mapping[str, Any], part: str) -> tuple[float, float, float]:
    """Quartiles of paired ratios; not a number where nothing was decoded."""
    if None in slow[f"{part}_s"]:
        return math.nan, math.nan, math.nan
    return paired_ratios(slow[f"{part}_s"], fast[f"{part}_s"])


def _median(values: Sequence[float | None]) -> float:
    return statistics.median(value for value in values if value is not None) if None not in values else math.nan


def longest_table(content: Mapping[str, Any]) -> pd.DataFrame:
    """A row of each arm: its longest prompt in tokens, and the peak memory there.

    `at_context_limit` says that the model has no room for a longer one, so that memory was not what ended the search. A
    prompt of which nothing fits is missing.

    Args:
        content: the object of longest-prompt.json.
    """
    rows = content["rows"]
    unpruned = next(row["longest"] for row in rows if row["method"] == "unpruned")
    return pd.DataFrame(
        [
            {
                "method": row["method"],
                "keep_ratio": row["keep_ratio"],
                "memory_limit": content["memory_limit"],
                "new_tokens": content["new_tokens"],
                "longest_prompt": row["longest"],
                "over_unpruned": row["longest"] / unpruned if row["longest"] and unpruned else math.nan,
                "peak_memory_bytes": row["peaks"].get(str(row["longest"])),
                "at_context_limit": row["longest"] == content["tokens_at_most"],
            }
            for row in rows
        ],
        columns=LONGEST_COLUMNS,
    )
