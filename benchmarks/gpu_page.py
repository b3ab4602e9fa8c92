"""The results of the benchmark as a Markdown page for docs/measurements/."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_rows import OUT_OF_MEMORY

Cell = Callable[[Mapping[str, Any]], str]


def number(column: str, form: str = ".2f", scale: float = 1.0) -> Cell:
    """A cell of a Markdown table: the column's number; empty where there is none."""
    return lambda row: "" if row.get(column) is None else format(row[column] * scale, form)


def spread(column: str) -> Cell:
    """A paired ratio's median (quartiles); empty in rows that are no ratio to the unpruned one."""

    def cell(row: Mapping[str, Any]) -> str:
        low, middle, high = row.get("quartiles", {}).get(column) or [None] * 3
        return "" if middle is None else f"{middle:.2f} ({low:.2f}–{high:.2f})"

    return cell


def keep_ratio(row: Mapping[str, Any]) -> str:
    """The cell that names an arm."""
    return "unpruned" if row["method"] == "unpruned" else str(row["keep_ratio"])


def prefill_time(row: Mapping[str, Any]) -> str:
    """Median (quartiles) of the prefill's seconds, or why there are none."""
    if row["status"] == OUT_OF_MEMORY:
        return OUT_OF_MEMORY
    return f"{row['prefill_s']:.4g} ({row['prefill_q25']:.4g}–{row['prefill_q75']:.4g})"


SPEED: dict[str, Cell] = {
    "prompt": number("prompt_tokens", ".0f"),
    "keep ratio": keep_ratio,
    "prefill, s": prefill_time,
    "speedup": spread("prefill_speedup"),
    "FLOP bound": number("flop_bound"),
    "length bound": spread("length_bound"),
    "efficiency": spread("efficiency"),
    "FLOP efficiency": number("flop_efficiency"),
    "prompt tokens/s": number("prompt_tokens_per_s", ".0f"),
    "TFLOP/s": number("prefill_tflop_per_s", ".3g"),
    "of matmul": number("matmul_fraction"),
    "decode, s": number("decode_s", ".4g"),
    "decode speedup": spread("decode_speedup"),
    "of copy": number("copy_fraction"),
    "end to end, s": number("end_to_end_s", ".4g"),
    "end to end speedup": spread("end_to_end_speedup"),
    "KV cache, MB": number("kv_cache_bytes", ".4g", 1e-6),
    "peak memory, GB": number("peak_memory_bytes", ".2f", 1e-9),
}
CHOOSING: dict[str, Cell] = {
    "prompt": number("prompt_tokens", ".0f"),
    "keep ratio": keep_ratio,
    "scorer, ms": number("scoring_s", ".3g", 1e3),
    "of prefill time": number("scoring_share", ".4f"),
    "scorer, TFLOP": number("scoring_tflop", ".3g"),
    "of prefill FLOPs": number("scoring_flop_share", ".4f"),
    "prefill above its length bound, ms": number("overhead_s", ".3g", 1e3),
    "of prefill time, all": number("overhead_share", ".4f"),
}


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Cell]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    cells = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return [*(f"| {' | '.join(line)} |" for line in cells), ""]


def markdown(result: Mapping[str, Any]) -> str:
    """The results as a page for docs/measurements/."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    ceiling = result["ceilings"]
    layers = ", ".join(map(str, result["schedules"][0]["layers"]))
    lines = [
        f"# {result['config']} on {result['card']}, {result['date'][:10]}",
        "",
        f"Random weights, {result['dtype']}, {result['attention']}, batch 1. Driver {result['driver'] or 'none'};",
        f"{versions}; commit {result['commit'] or 'unknown'}.",
        f"Stages before layers {layers}; a learned scorer with random weights. {result['new_tokens']} new tokens.",
        f"Medians (quartiles) of {result['repeats']} interleaved repeats after {result['warmup']} warm-up round;",
        f"ratios are paired within a repeat. The run took {result['elapsed_s']:.0f} s.",
        "",
        f"Ceilings measured in the same run: {ceiling['matmul_tflop_per_s']:.3g} TFLOP/s in a decoder layer's",
        f"products over {ceiling['matmul_tokens']} tokens, {ceiling['copy_gb_per_s']:.0f} GB/s copying (read plus",
        "written).",
        "",
        f"    {result['command']}",
        "",
        "## Speed and memory",
        "",
        *table(result["rows"], SPEED),
        "## What choosing tokens costs",
        "",
        *table([row for row in result["rows"] if row["method"] == "sdtp"], CHOOSING),
        "## Checks",
        "",
        *table(result["checks"], {name: operator.itemgetter(name) for name in ("check", "result", "detail")}),
    ]
    if result["left_out"]:
        columns: dict[str, Cell] = {
            "prompt": number("prompt_tokens", ".0f"),
            "keep ratio": lambda row: str(row["keep_ratio"]),
            "why": operator.itemgetter("reason"),
        }
        lines += ["## Left out", "", *table(result["left_out"], columns)]
    return "\n".join(lines)
