"""The figures of the trade-off: quality against measured prefill speedup, and against measured peak memory."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp.evaluation import names
from sdtp.pipeline.plotstyle import METHODS, OTHER, STYLE, label_points, name_of
from sdtp.pipeline.results import LOWER_IS_BETTER, smoke
from sdtp.pipeline.suite_tables import NAMES
from sdtp.pipeline.tables import TASK_METRICS

# How much of the responses may come before a compression for a quality to be marked as saying little of it.
MARKED = 0.25


@mpl.rc_context(STYLE)
def tradeoff(table: pd.DataFrame) -> Figure:
    """Quality against prefill speedup: a line a method, a point a keep ratio.

    Upright bars are 95% intervals of the quality, level ones quartiles of the speedup. A loss stands as what it is
    above the unpruned model's on the same examples, whose losses differ more from each other than any method makes
    them. A column a task, of which the first metric, or a suite, of which the whole score; a row a timed length.

    Args:
        table: `sdtp.pipeline.tradeoff.tradeoff_table`.
    """
    middle = table["prefill_speedup"]
    shown = table.assign(x=middle, x_low=middle - table["speedup_q25"], x_high=table["speedup_q75"] - middle)
    return _figure(shown, "prefill speedup (×)", 1.0)


@mpl.rc_context(STYLE)
def memory(table: pd.DataFrame) -> Figure:
    """Quality against peak memory, less the unpruned model's in the same process; otherwise as `tradeoff`.

    Differences, since what a process holds beside the model is another size in each. A level bar goes from the least to
    the largest of the few passes that were measured.

    Args:
        table: `sdtp.pipeline.tradeoff.tradeoff_table`.
    """
    low, middle, high = (table[f"memory_difference_{name}"] / 1e6 for name in ("low", "bytes", "high"))
    shown = table.assign(x=middle, x_low=middle - low, x_high=high - middle)
    return _figure(shown, "peak memory above unpruned (MB)", 0.0)


def _figure(table: pd.DataFrame, what: str, reference: float) -> Figure:
    tasks = list(dict.fromkeys(table["task"]))
    lengths = sorted(table["timed_tokens"].dropna().unique())
    figure = Figure(figsize=(5.6 * len(tasks), 0.5 + 4.1 * len(lengths)), layout="constrained")
    grid = figure.subplots(len(lengths), len(tasks), squeeze=False)
    pruned = table.loc[~table["method"].map(names.unpruned_ratio), "keep_ratio"]
    notes = ["a point a keep ratio: " + ", ".join(f"{ratio:g}" for ratio in sorted(pruned.unique(), reverse=True))]
    drawn = []
    for length, panels in zip(lengths, grid, strict=True):
        for task, axes in zip(tasks, panels, strict=True):
            metric = next(iter(TASK_METRICS.get(task, {"score": ""})))
            rows = table[(table["task"] == task) & (table["metric"] == metric) & (table["timed_tokens"] == length)]
            tokens = f"{rows['quality_tokens'].median():,.0f} tokens"
            if metric in LOWER_IS_BETTER:
                rows = _less_unpruned(rows)
                quality = f"{metric} above unpruned at {tokens} (lower is better)"
            else:
                quality = f"{metric} at {tokens} (higher is better)"
            axes.set(xlabel=f"{what} at {length:,.0f} tokens", ylabel=quality)
            axes.set_title(f"{_called(task)}, {smoke(int(rows['n'].min()))}")
            drawn.append((axes, rows.dropna(subset="x")))
    if any((rows["from_prefill"] >= MARKED).any() for _, rows in drawn):
        notes.append(
            "hollow: a quarter or more of the responses, or of their tokens, was predicted by the prefill, before the "
            "cache was compressed"
        )
    figure.supxlabel("; ".join(notes), x=0.01, ha="left", fontsize=9, color="#444444")
    ends = [_panel(axes, rows, reference) for axes, rows in drawn]
    for (axes, _), points in zip(drawn, ends, strict=True):  # last: they stand where the layout leaves them
        label_points(figure, axes, points)
    return figure


def _less_unpruned(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with paired differences for values, 0 of the unpruned model, which has no interval."""
    columns = {name: f"difference{end}" for name, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
    return rows.assign(
        **{name: rows[column].where(rows["method"] != "unpruned", 0.0) for name, column in columns.items()}
    )


def _called(task: str) -> str:
    """A task as it is, a suite by its printed name."""
    suite, _, language = task.partition("-")
    return NAMES.get(suite, task) + (" in Chinese" if language == "zh" else "")


def _panel(axes: Axes, rows: pd.DataFrame, reference: float) -> list[tuple[float, float, str, str]]:
    """Draws one panel; of each line its end, (x, y, name, colour)."""
    ends: list[tuple[float, float, str, str]] = []
    grey = METHODS["unpruned"][1]
    unpruned = rows[rows["method"] == "unpruned"]
    if len(unpruned):
        level = unpruned["value"].item()
        axes.axhspan(unpruned["low"].item(), unpruned["high"].item(), color=grey, alpha=0.07, linewidth=0)
        axes.axhline(level, color=grey, linestyle="--", linewidth=1)
        axes.axvline(reference, color=grey, linestyle="--", linewidth=1)
        axes.plot(reference, level, color=grey, marker=METHODS["unpruned"][2], linestyle="")
        ends.append((reference, level, name_of("unpruned"), grey))
    for method in dict.fromkeys(rows.loc[~rows["method"].map(names.unpruned_ratio), "method"]):
        line = rows[rows["method"] == method].sort_values("keep_ratio", ascending=False)
        _, colour, marker = METHODS.get(method, (method, *OTHER))
        bars: dict[str, Any] = {"yerr": _bars(line["value"] - line["low"], line["high"] - line["value"])}
        if (line["x_high"] + line["x_low"]).any():
            bars["xerr"] = _bars(line["x_low"], line["x_high"])
        axes.errorbar(
            line["x"],
            line["value"],
            **bars,
            color=colour,
            marker=marker,
            markerfacecolor="white" if (line["from_prefill"] >= MARKED).any() else colour,
            linestyle=_line_style(method),
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
        )
        ends.append((line["x"].iloc[-1], line["value"].iloc[-1], name_of(method), colour))
    return ends


def _line_style(method: str) -> str:
    """Solid where tokens are removed at stages, dashed with a compression on top, dotted for what does otherwise."""
    base, rule = names.parts(method)
    if base not in (*names.LEARNED, *names.BASELINES):
        return ":"
    return "--" if rule else "-"


def _bars(below: pd.Series, above: pd.Series) -> list[pd.Series]:
    """Lengths of error bars; an interval may lie to one side of its value by rounding, or not exist."""
    return [below.clip(lower=0).fillna(0.0), above.clip(lower=0).fillna(0.0)]
