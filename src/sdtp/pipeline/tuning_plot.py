"""The figure of a tuned schedule: what pruning costs at each stage, and what was chosen over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sdtp.pipeline.plotstyle import METHODS, STYLE, shades

# Schedules by their names in the figure.
COLOURS = {"geometric": METHODS["sdtp"][1], "tuned": METHODS["sdtp-tuned"][1]}


@mpl.rc_context(STYLE)
def tuning(
    curves: Mapping[int, Sequence[tuple[float, float, float, float]]],
    schedules: Mapping[str, Sequence[int]],
    prompt_tokens: int,
    examples: int,
) -> Figure:
    """Damage curves of the stages on the left, token counts of the schedules on the right.

    Args:
        curves: a stage's layer -> (share of the prompt left, mean KL, lower and upper end of its interval), measured.
        schedules: name, `geometric` or `tuned` -> tokens of each decoder layer.
        prompt_tokens: of the prompt that the counts are for.
        examples: that the curves are means of.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (layer, points), colour in zip(curves.items(), shades(len(curves)), strict=True):
        share, mean, low, high = np.array(sorted(points, reverse=True)).T
        left.errorbar(
            share, mean, yerr=[mean - low, high - mean], color=colour, marker="o", elinewidth=1, label=f"{layer}"
        )
    left.set(
        xlabel="share of the prompt's tokens left by one stage alone",
        ylabel="KL from unpruned (nats a token)",
        title=f"mean and 95% interval of {examples} examples",
    )
    left.xaxis.set_inverted(True)
    left.set_ylim(0, None)
    left.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    # Little is lost where much is kept: there is room.
    left.legend(title="stage at layer", ncols=-(-len(curves) // 5), loc="upper left")
    for name, lengths in schedules.items():
        places = np.arange(len(lengths) + 1) - 0.5
        right.stairs(np.array(lengths) / prompt_tokens, places, baseline=None, color=COLOURS[name], label=name)
    for layer in curves:
        right.axvline(layer - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
    right.set(
        xlabel="decoder layer", ylabel="share of the prompt's tokens", title=f"a prompt of {prompt_tokens:,} tokens"
    )
    right.set_ylim(0, 1.03)
    right.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    right.legend()
    return figure
