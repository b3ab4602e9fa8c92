"""The figures of the sweeps: quality by where one stage stands, and by how many stages there are."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from sdtp.pipeline.plotstyle import METHODS, STYLE, shades
from sdtp.pipeline.results import LOWER_IS_BETTER, quality_panels, smoke

AXES = {"layers": "layer that one stage stands before", "stages": "number of stages"}


@mpl.rc_context(STYLE)
def sweep(table: pd.DataFrame, by: str) -> Figure:
    """Means with 95% intervals, a panel a task and metric, a line a keep ratio; the unpruned model is a level line.

    Agreement with the unpruned model is in the table alone.

    The last panel is the calculated speedup, over all tasks' prompts alike. Differences from the unpruned model, which
    are of the same examples and so have narrower intervals, are in the table.

    Args:
        table: as `sdtp.pipeline.sweeps.sweep_table` gives it; of single stages where it is drawn by layer.
        by: the column that is the horizontal axis, a key of `AXES`.
    """
    panels = quality_panels(table)
    pruned = table[table["method"] == "sdtp"].astype({by: int})
    ratios = sorted(pruned["keep_ratio"].unique(), reverse=True)
    colours = dict(zip(ratios, shades(len(ratios)), strict=True))
    places = sorted(pruned[by].unique())
    aside = 0.36 / max(1, len(ratios) - 1)  # side by side, or intervals would hide each other
    figure = Figure(figsize=(1.0 + 3.1 * (len(panels) + 1), 3.9), layout="constrained")
    *own, last = figure.subplots(1, len(panels) + 1)
    for axes, (task, metric) in zip(own, panels, strict=True):
        of_panel = table[(table["task"] == task) & (table["metric"] == metric)]
        unpruned = of_panel[of_panel["method"] == "unpruned"].iloc[0]
        name, colour, _ = METHODS["unpruned"]
        axes.axhline(unpruned["value"], color=colour, linewidth=1.2, label=name, zorder=0)
        for index, ratio in enumerate(ratios):
            rows = pruned[(pruned["task"] == task) & (pruned["metric"] == metric) & (pruned["keep_ratio"] == ratio)]
            rows = rows.sort_values(by)
            bars = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            axes.errorbar(
                rows[by] + (index - (len(ratios) - 1) / 2) * aside,
                rows["value"],
                yerr=bars,
                color=colours[ratio],
                marker=METHODS["sdtp"][2],
                elinewidth=1,
                label=f"keep ratio {ratio:g}",
            )
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        axes.set_title(f"{task}, {smoke(int(of_panel['n'].min()))}")
        axes.set_ylabel(f"{metric} ({better} is better)")
        axes.set_xlabel(AXES[by])
        axes.set_xticks(places)
    for ratio in ratios:
        speedups = pruned[pruned["keep_ratio"] == ratio].groupby(by)["flop_speedup"].mean()
        last.plot(speedups.index, speedups, color=colours[ratio], marker=METHODS["sdtp"][2])
    last.axhline(1.0, color=METHODS["unpruned"][1], linewidth=1.2, zorder=0)
    last.set_title("calculated, not timed")
    last.set_ylabel("prefill FLOPs, unpruned / pruned")
    last.set_xlabel(AXES[by])
    last.set_xticks(places)
    handles, labels = own[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure
