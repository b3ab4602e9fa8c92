"""The figure of a fact that has to be found: how often it is, by its depth and the prompt's length."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from sdtp.errors import UserError
from sdtp.evaluation.ruler.scoring import HeatMap
from sdtp.pipeline.plotstyle import STYLE, name_of
from sdtp.pipeline.results import smoke

# Panels side by side before another row of them begins.
_COLUMNS = 3
# Scores below it are written in white, on the dark half of the map.
_DARK = 60


@mpl.rc_context(STYLE)
def heat_maps(maps: Mapping[str, HeatMap]) -> Figure:
    """Depth against length, a panel a method, on one colour scale from 0 to 100%; the value stands in each cell.

    Args:
        maps: method, or a text for one under several settings -> its scores, of the same depths and lengths, as
            `sdtp.evaluation.ruler.scoring.heat_map` gives them.

    Raises:
        UserError: no maps, or of different depths or lengths.
    """
    if not maps:
        raise UserError("no heat maps; at least one method's is needed")
    first = next(iter(maps.values()))
    for method, own in maps.items():
        if (own.depths, own.lengths) != (first.depths, first.lengths):
            raise UserError(
                f"{method} was asked at depths {own.depths} and lengths {own.lengths}, the first method at "
                f"{first.depths} and {first.lengths}: one grid is needed"
            )
    columns = min(_COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    panel = (max(2.6, 0.8 + 0.62 * len(first.lengths)), max(2.2, 0.8 + 0.3 * len(first.depths)))
    figure = Figure(figsize=(1.6 + columns * panel[0], 0.3 + rows * panel[1]), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(panels.flat):
        axes.set_visible(number < len(maps))
    for (method, own), axes in zip(maps.items(), panels.flat, strict=False):
        image = axes.imshow(own.values, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        for row, scores in enumerate(own.values):
            for column, value in enumerate(scores):
                ink = "white" if value < _DARK else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(own.lengths)), [f"{length:,}" for length in own.lengths])
        axes.set_yticks(range(len(own.depths)), [f"{100 * depth:g}%" for depth in own.depths])
        axes.set(xlabel="prompt length (tokens)", title=f"{name_of(method)}, {smoke(own.n)} a cell")
    for axes in panels[:, 0]:
        axes.set_ylabel("depth of the fact")
    figure.colorbar(image, ax=panels, label="facts found (%)", pad=0.01)
    return figure
