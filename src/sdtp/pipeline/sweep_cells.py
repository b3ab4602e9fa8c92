"""Where and how often the sweeps prune: the cells of the paper's Fig. 4 and 5.

Without slow imports: the Snakefile reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sdtp.errors import UserError
from sdtp.pipeline.config import PruningSettings
from sdtp.pipeline.target_settings import SweepSettings

# Decoder layers of the stages, and what each keeps of the tokens that reach it.
SweepCell = tuple[tuple[int, ...], float]


def position_cells(sweep: SweepSettings) -> list[SweepCell]:
    """One stage, before each of the layers in turn (paper, Fig. 4)."""
    return [((layer,), ratio) for layer, ratio in itertools.product(sorted(sweep.layers), _falling(sweep.layer_ratios))]


def count_cells(sweep: SweepSettings, pruning: PruningSettings) -> list[SweepCell]:
    """The run's first so many stages, each with the same ratio (paper, Fig. 5): more stages keep fewer tokens."""
    return [
        (_first_stages(pruning, count), ratio)
        for count, ratio in itertools.product(sorted(sweep.counts), _falling(sweep.count_ratios))
    ]


def _first_stages(pruning: PruningSettings, count: int) -> tuple[int, ...]:
    return tuple(pruning.start + pruning.step * stage for stage in range(count))


def _falling(ratios: Sequence[float]) -> list[float]:
    return sorted(ratios, reverse=True)


def swept_layers(sweep: SweepSettings, pruning: PruningSettings, num_layers: int) -> tuple[int, ...]:
    """Every layer that a stage of either sweep stands before, ascending.

    Raises:
        UserError: one that a model of `num_layers` layers does not have, or a layer 0, naming the key.
    """
    for layer in sweep.layers:
        if not 1 <= layer < num_layers:
            raise UserError(
                f"sweep.layers: {layer} is no layer to prune at; the model has {num_layers} layers, so that 1 to "
                f"{num_layers - 1} are accepted"
            )
    most = len(range(pruning.start, num_layers, pruning.step))
    for count in sweep.counts:
        if not 1 <= count <= most:
            raise UserError(
                f"sweep.counts: {count} stages at layers {pruning.start}, {pruning.start + pruning.step}, ... (see "
                f"pruning.start and pruning.step) do not fit a model of {num_layers} layers; 1 to {most} are accepted"
            )
    return tuple(sorted({*sweep.layers, *_first_stages(pruning, max(sweep.counts))}))
