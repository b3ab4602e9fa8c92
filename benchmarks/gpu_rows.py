"""The rows of the results: latency.csv's columns, the device's ceilings beside them, and every repeat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpu_measure import Bench, Measured

from sdtp.evaluation import latency
from sdtp.evaluation.latency import Samples, Timing
from sdtp.evaluation.stats import paired_ratios
from sdtp.pipeline.tables import efficiency, latency_table
from sdtp.pipeline.timings import times

OUT_OF_MEMORY = "out of memory"
# Columns of latency.csv that are known without running anything; an arm that ran out of memory has no others.
ANALYTIC_COLUMNS = frozenset(
    {"method", "keep_ratio", "prompt_tokens", "new_tokens"}
    | {"prefill_tflop", "flop_bound", "kept_tokens", "scoring_tflop"}
)


def rows_of(bench: Bench, measured: Measured) -> list[dict[str, Any]]:
    """The rows of one length: latency.csv's columns, the device's ceilings beside them, and every repeat."""
    unpruned = _raw(bench, measured, "unpruned", None)
    rows: list[dict[str, Any]] = []
    for ratio in measured.ratios:
        raw = _raw(bench, measured, f"sdtp/{ratio}", ratio)
        table = latency_table([{"keep_ratio": ratio, "rows": [unpruned, raw]}])
        columns: list[dict[str, Any]] = [dict(zip(table.columns, row, strict=True)) for row in table.values.tolist()]
        if not rows and "unpruned" in measured.tried:
            rows.append(_row(bench, columns[0], unpruned, unpruned))
        rows.append(_row(bench, columns[1], raw, unpruned))
    return rows


def _raw(bench: Bench, measured: Measured, arm: str, ratio: float | None) -> dict[str, Any]:
    """What `latency_table` reads of one arm; times that were not measured are nan."""
    missing = Timing(math.nan, math.nan, bench.new_tokens)

    def samples(name: str) -> Samples:
        return measured.samples.get(name, Samples(missing, [missing] * bench.repeats))

    work = bench.work[measured.tokens, ratio]
    nothing: dict[str, int | None] = {"peak_memory_bytes": None, "kv_cache_bytes": None}
    held = measured.held[arm] if arm in measured.samples else nothing
    row = times(arm.partition("/")[0], measured.tokens, samples(arm))
    row |= {**held, "peak_memory_bytes": [held["peak_memory_bytes"]]}
    row |= {name: getattr(work, name) for name in ("prefill_flop", "scoring_flop", "kept_tokens")}
    for name in () if ratio is None else ("ideal", "scoring"):
        row[f"{name}_s"] = [timing.prefill_s for timing in samples(f"{name}/{ratio}").warm]
    return row


def _row(bench: Bench, columns: dict[str, Any], raw: dict[str, Any], unpruned: dict[str, Any]) -> dict[str, Any]:
    """One row of the results from the row of `latency_table`; numbers that do not exist are nan or None."""
    if math.isnan(columns["prefill_s"]):
        known = {name: value if name in ANALYTIC_COLUMNS else None for name, value in columns.items()}
        return {"status": OUT_OF_MEMORY, **known}
    seconds = columns["prefill_s"]
    flop_per_s = columns["prefill_tflop"] * 1e12 / seconds
    step_s = columns["decode_s"] / (bench.new_tokens - 1) if bench.new_tokens > 1 else math.nan
    byte_per_s = (bench.weight_bytes + columns["kv_cache_bytes"]) / step_s
    row = {
        "status": "measured",
        **columns,
        "prompt_tokens_per_s": latency.prefill_tokens_per_second(1, columns["prompt_tokens"], seconds),
        "prefill_tflop_per_s": flop_per_s / 1e12,
        "matmul_fraction": flop_per_s / bench.matmul_flop_per_s,
        "seconds_per_output_token": step_s,
        "decode_gb_per_s": byte_per_s / 1e9,
        "copy_fraction": byte_per_s / bench.copy_byte_per_s,
        "samples": {name: values for name, values in raw.items() if name.endswith("_s") and isinstance(values, list)},
    }
    if raw is unpruned:
        return row
    ratios = {
        "prefill_speedup": paired_ratios(unpruned["prefill_s"], raw["prefill_s"]),
        "end_to_end_speedup": paired_ratios(unpruned["end_to_end_s"], raw["end_to_end_s"]),
        "length_bound": paired_ratios(unpruned["prefill_s"], raw["ideal_s"]),
        "efficiency": efficiency(raw),
    }
    if bench.new_tokens > 1:
        ratios["decode_speedup"] = paired_ratios(unpruned["decode_s"], raw["decode_s"])
    return row | {
        "quartiles": ratios,
        "scoring_share": paired_ratios(raw["scoring_s"], raw["prefill_s"])[1],
        "scoring_flop_share": raw["scoring_flop"] / raw["prefill_flop"],
        "overhead_share": columns["overhead_s"] / seconds,
    }


def plain(value: Any) -> Any:
    """JSON without nan: a number that does not exist is null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
