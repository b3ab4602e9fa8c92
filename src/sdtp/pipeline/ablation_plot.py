"""The figure of an ablation: the quality of each variant's pruner, beside that of the methods it is compared with."""

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp.pipeline.plotstyle import METHODS, OTHER, STYLE, name_of
from sdtp.pipeline.results import LOWER_IS_BETTER, quality_panels, smoke


@mpl.rc_context(STYLE)
def ablation(table: pd.DataFrame) -> Figure:
    """Means of the variants with 95% intervals, a row of panels a keep ratio, a panel a task and metric.

    Methods that the variants are compared with are vertical lines. Differences are in the table, paired, and so is
    agreement with the unpruned model.

    Args:
        table: as `sdtp.pipeline.ablations.ablation_table` gives it.
    """
    variants = table.loc[table["variant"] != "", "variant"].nunique()
    panels = quality_panels(table)
    ratios = list(dict.fromkeys(table.loc[table["variant"] != "", "keep_ratio"]))
    size = (1.5 + 2.9 * len(panels), 0.8 + len(ratios) * (1.1 + 0.28 * variants))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(ratios), len(panels), sharey=True, squeeze=False)
    for axes_row, ratio in zip(grid, ratios, strict=True):
        for axes, (task, metric) in zip(axes_row, panels, strict=True):
            rows = table[(table["task"] == task) & (table["metric"] == metric)]
            rows = rows[(rows["keep_ratio"] == ratio) | (rows["method"] == "unpruned")]
            _panel(axes, rows)
            better = "lower" if metric in LOWER_IS_BETTER else "higher"
            axes.set(xlabel=f"{metric} ({better} is better)", title=f"{task}, {smoke(int(rows['n'].min()))}")
        axes_row[0].set_ylabel(f"keep ratio {ratio:g}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    """Variants from top to bottom, the methods across them."""
    for row in rows[rows["variant"] == ""].to_dict("records"):
        method = str(row["method"])
        _, colour, _ = METHODS.get(method, (method, *OTHER))
        axes.axvline(row["value"], color=colour, linewidth=1.2, label=name_of(method))
    own = rows[rows["variant"] != ""]
    bars = [own["value"] - own["ci_low"], own["ci_high"] - own["value"]]
    _, colour, marker = METHODS["sdtp"]
    axes.errorbar(own["value"], range(len(own)), xerr=bars, color=colour, marker=marker, linestyle="", capsize=3)
    axes.set_yticks(range(len(own)), list(own["variant"]))
    axes.set_ylim(len(own) - 0.5, -0.5)
