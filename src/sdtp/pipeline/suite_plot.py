"""The figure of a suite: scores by task, with intervals, each method beside the others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp.pipeline.plotstyle import METHODS, OTHER, STYLE, name_of
from sdtp.pipeline.results import smoke
from sdtp.pipeline.suite_tables import ALL, NAMES

# Height of one method's mark in a task's band, and of what is free between two bands, in inches.
_MARK, _FREE = 0.12, 0.16


@mpl.rc_context(STYLE)
def suite(table: pd.DataFrame) -> Figure:
    """Mean scores with 95% intervals, a panel a keep ratio, a band a task, all lengths together.

    The whole suite is the band at the top; of LongBench in two languages, the whole of each above its tasks; of the
    harness, which has no whole, each category's mean above its tasks.
    Differences from the unpruned model are in the table, paired.

    Args:
        table: as `sdtp.pipeline.suite_tables.suite_table` gives it, or `sdtp.pipeline.steps.harness_table`.
    """
    whole = table["category"] == ALL
    rows = table[table["length"].isna() & ((table["task"] != ALL) | whole | (not whole.any()))]
    several = rows.loc[rows["task"] == ALL, "language"].nunique() > 1
    rows = rows.assign(band=[_label(row, several) for row in rows.to_dict("records")])
    bands = list(dict.fromkeys(rows["band"]))
    pruned = rows[rows["method"] != "unpruned"]
    ratios = sorted(pruned["keep_ratio"].unique(), reverse=True) or [1.0]
    methods = ["unpruned", *dict.fromkeys(pruned["method"])]
    height = 1.0 + len(bands) * (_FREE + _MARK * len(methods))
    figure = Figure(figsize=(2.0 + 3.4 * len(ratios), height), layout="constrained")
    grid = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axes, ratio in zip(grid, ratios, strict=True):
        _panel(axes, rows[(rows["method"] == "unpruned") | (rows["keep_ratio"] == ratio)], bands, methods)
        few = int(rows.loc[rows["task"] != ALL, "n"].min())
        axes.set(xlabel="mean score (%)", title=f"keep ratio {ratio:g}, {smoke(few)} a task", xlim=(-3, 103))
    grid[0].set_yticks(range(len(bands)), bands)
    grid[0].set_ylim(len(bands) - 0.5, -0.5)
    handles, labels = grid[0].get_legend_handles_labels()
    title = NAMES.get(str(rows["suite"].iloc[0]), "")
    figure.legend(handles, labels, loc="outside upper center", ncols=min(2 * len(ratios), len(labels)), title=title)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, bands: list[str], methods: list[str]) -> None:
    """Bands from top to bottom; in each the methods from top to bottom."""
    step = _MARK / (_FREE + _MARK * len(methods))
    for number, method in enumerate(methods):
        own = rows[rows["method"] == method]
        _, colour, marker = METHODS.get(method, (method, *OTHER))
        places = [bands.index(band) + step * (number - (len(methods) - 1) / 2) for band in own["band"]]
        # An interval may lie to one side of a score by rounding.
        bars = [(own["value"] - own["low"]).clip(lower=0), (own["high"] - own["value"]).clip(lower=0)]
        axes.errorbar(own["value"], places, xerr=bars, color=colour, marker=marker, linestyle="", label=name_of(method))
    axes.axhline(0.5, color="#BBBBBB", linewidth=0.8)
    axes.grid(axis="x", color="#EEEEEE")


def _label(row: Mapping[Hashable, Any], several: bool) -> str:
    """What a band is called; `several`: whether there are languages to tell apart."""
    if row["task"] != ALL:
        return str(row["task"]).replace("_", " ")
    if row["category"] != ALL:
        return f"mean, {row['category']} tasks"
    return {"en": "all English tasks", "zh": "all Chinese tasks"}[row["language"]] if several else "all tasks"
