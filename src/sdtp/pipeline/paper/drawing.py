"""The figures of the paper's parts: dots with intervals for tables, lines for what runs over layers or lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp.pipeline.paper.part import Part
from sdtp.pipeline.plotstyle import METHODS, STYLE, label_ends, name_of, shades
from sdtp.pipeline.results import smoke

# Panels side by side, so that one of several rows stays as wide as the page.
ACROSS = 3
PAPER: dict[str, Any] = {"color": "#D55E00", "marker": "x", "linestyle": ":", "linewidth": 1.2}


@mpl.rc_context(STYLE)
def nothing(part: Part) -> Figure:
    """What stands in the place of a figure where no row was run: the reasons, in words."""
    figure = Figure(figsize=(8, 1.6), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    reasons = "\n".join(dict.fromkeys(part.rows["why"].dropna()))
    axes.text(0, 0.5, f"not run\n{reasons}", va="center", wrap=True, parse_math=False, transform=axes.transAxes)
    return figure


@mpl.rc_context(STYLE)
def dots(part: Part, panel: Sequence[str], line: Sequence[str], value: str, label: str) -> Figure:
    """A panel each value of the columns `panel`, a line in it for each of `line`, in the order of the rows.

    A bar is the 95% interval where the value has one; a cross is the paper's number. Rows that were not run are left
    out; a figure of none says why.

    Args:
        part: whose rows are drawn.
        panel, line: key columns.
        value: a column of its values.
        label: of the horizontal axis.
    """
    rows = part.measured.dropna(subset=[value])
    if rows.empty:
        return nothing(part)
    groups = list(rows.groupby(list(panel), sort=False)) if panel else [("", rows)]
    names = list(dict.fromkeys(_name(row, line) for row in rows.to_dict("records")))
    height = -(-len(groups) // ACROSS)
    size = (1.6 + 2.6 * min(ACROSS, len(groups)), height * (1.0 + 0.26 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(height, min(ACROSS, len(groups)), sharey=True, squeeze=False).flat
    for (group, cells), axes in zip(groups, grid, strict=False):  # groups first: zip draws one too many of the first
        _dots(axes, cells, names, line, value)
        words = [str(word) for word in (group if isinstance(group, tuple) else (group,)) if word != ""]
        examples = cells["n"].dropna()
        title = ", ".join([*words, *([smoke(int(examples.min()))] if len(examples) else [])])
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xlabel(label)
    for axes in grid:
        axes.set_visible(False)
    return figure


def _dots(axes: Axes, cells: pd.DataFrame, names: Sequence[str], line: Sequence[str], value: str) -> None:
    for row in cells.to_dict("records"):
        place = names.index(_name(row, line))
        _, colour, marker = METHODS.get(str(row.get("method", row.get("variant"))), METHODS["sdtp"])
        bars = None
        if f"{value}_low" in row and pd.notna(row[f"{value}_low"]):
            # Rounding may put a bound a hair inside.
            bars = [[max(0.0, row[value] - row[f"{value}_low"])], [max(0.0, row[f"{value}_high"] - row[value])]]
        axes.errorbar(row[value], place, xerr=bars, color=colour, marker=marker, linestyle="", capsize=3)
        if pd.notna(row.get(f"{value}_paper")):
            axes.plot(row[f"{value}_paper"], place, color=PAPER["color"], marker=PAPER["marker"], linestyle="")
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)


def _name(row: dict[Any, Any], line: Sequence[str]) -> str:
    """What a line is called: its keys, a method by its printed name, a ratio in as few digits as it has."""
    words = [name_of(row[key]) if key == "method" else _short(row[key]) for key in line]
    return " ".join(word for word in words if word)


def _thousands(number: float) -> str:
    """A number of tokens as the paper writes it: 4K for 4,096."""
    return f"{number / 1024:g}K" if number >= 1024 and number % 512 == 0 else f"{number:g}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@mpl.rc_context(STYLE)
def lines(part: Part, across: str, values: Sequence[tuple[str, str]], by: str, logarithmic: bool = False) -> Figure:
    """A panel each of `values`, a line each of `by`, over `across`; with 95% bars, and the paper's numbers as crosses.

    Args:
        part: whose rows are drawn.
        across: a key column of numbers.
        values: columns and the labels of their axes.
        by: a key column.
        logarithmic: whether `across` is.
    """
    rows = part.measured
    if rows.empty:
        return nothing(part)
    figure = Figure(figsize=(1 + 4.2 * len(values), 3.8), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    groups = list(rows.groupby(by, sort=False))
    for axes, (value, label) in zip(panels, values, strict=True):
        ends = []
        for (name, cells), colour in zip(groups, shades(len(groups)), strict=True):
            cells = cells.dropna(subset=[value]).sort_values(across)
            if cells.empty:
                continue
            bars = None
            if f"{value}_low" in cells:
                low, high = cells[value] - cells[f"{value}_low"], cells[f"{value}_high"] - cells[value]
                bars = [low.clip(lower=0), high.clip(lower=0)]
            axes.errorbar(cells[across], cells[value], yerr=bars, color=colour, marker="o", capsize=3)
            ends.append((float(cells[value].iloc[-1]), _short(name), colour))
        paper = part.rows.dropna(subset=[f"{value}_paper"]) if f"{value}_paper" in part.rows else part.rows[:0]
        if len(paper):
            paper = paper.sort_values(across)
            axes.plot(paper[across], paper[f"{value}_paper"], **PAPER)
            ends.append((float(paper[f"{value}_paper"].iloc[-1]), "the paper's", PAPER["color"]))
        if logarithmic:
            axes.set_xscale("log")
        ticks = sorted({*rows[across], *paper[across]})
        axes.set_xticks(ticks, [_thousands(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set(xlabel=part.keys[across].lower(), ylabel=label)
        label_ends(figure, axes, max(ticks), ends)
    return figure


@mpl.rc_context(STYLE)
def sparsity(part: Part) -> Figure:
    """Figure 2: the mean share of salient tokens over layers, in the band of the examples' quartiles, with 95% bars."""
    rows = part.rows
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    _, colour, _ = METHODS["sdtp"]
    axes.fill_between(rows["layer"], rows["q25"], rows["q75"], color=colour, alpha=0.2, linewidth=0)
    bars = [
        (rows["salient"] - rows["salient_low"]).clip(lower=0),
        (rows["salient_high"] - rows["salient"]).clip(lower=0),
    ]
    axes.errorbar(rows["layer"], rows["salient"], yerr=bars, color=colour, marker="o", capsize=3)
    axes.set(xlabel="entering decoder layer", ylabel="salient tokens", xticks=rows["layer"])
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes.set_title(f"mean, its 95% interval and the quartiles of {int(rows['n'].min())} prompts")
    return figure
