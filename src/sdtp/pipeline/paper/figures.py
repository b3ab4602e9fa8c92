"""The figure of each of the paper's tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from sdtp.pipeline import plots, sweep_plot
from sdtp.pipeline.paper import drawing
from sdtp.pipeline.paper.part import Part
from sdtp.pipeline.paper.sweep import HORIZONTAL

# Of each table the columns that its panels are, those that name a line in them, and the horizontal axis.
DOTS: Mapping[str, tuple[Sequence[str], Sequence[str], str]] = {
    "table-1": (("suite", "category"), ("method", "keep_ratio"), "score"),
    "table-3": (("task",), ("method", "keep_ratio"), "accuracy (%)"),
    "table-4": (("task", "metric"), ("variant", "keep_ratio"), "mean"),
    "table-5": (("task", "metric"), ("variant", "keep_ratio"), "mean"),
    "table-6": (("task", "metric"), ("method", "keep_ratio"), "mean"),
}


def figure(part: Part, reduction: str, sweeps: Mapping[str, pd.DataFrame]) -> Figure:
    """The figure of one part.

    Args:
        part: the numbers.
        reduction: of the saliency, which Figure 1 shows.
        sweeps: by the name of their part, the tables of schedules that Figures 4 and 5 show.
    """
    if part.name == "figure-1":
        scores = part.rows.pivot(index="layer", columns="position", values="saliency")
        tokens = part.rows[part.rows["layer"] == scores.index[0]].sort_values("position")["token"]
        return plots.saliency(scores.to_numpy(), list(scores.index), list(tokens), reduction)
    if part.name == "figure-2":
        return drawing.sparsity(part)
    if part.name in HORIZONTAL:
        return sweep_plot.sweep(sweeps[part.name], HORIZONTAL[part.name])
    if part.name == "table-2":
        values = [("prefill_speedup", "prefill speedup (×)"), ("end_to_end_speedup", "end-to-end speedup (×)")]
        return drawing.lines(part, "prompt_tokens", values, "keep_ratio", logarithmic=True)
    panel, line, label = DOTS[part.name]
    return drawing.dots(part, panel, line, "value", label)
