"""The pruning schedule that the settings give a model."""

from __future__ import annotations

from sdtp.errors import UserError
from sdtp.pipeline.config import PruningSettings
from sdtp.pruning.schedule import PruningSchedule


def stage_layers(pruning: PruningSettings, num_layers: int) -> tuple[int, ...]:
    """The 0-based decoder layers before which tokens are removed, whatever the keep ratio: `start, start + step, ...`.

    Raises:
        UserError: the model has no layer `start`.
    """
    _check_start(pruning, num_layers)
    return PruningSchedule.geometric(num_layers, pruning.start, pruning.step, 1.0).layers


def build_schedule(pruning: PruningSettings, num_layers: int, ratio: float) -> PruningSchedule:
    """The schedule for a model of `num_layers` layers that keeps the fraction `ratio`, in (0, 1], at each stage.

    Raises:
        UserError: the model has no layer `pruning.start`.
    """
    _check_start(pruning, num_layers)
    return PruningSchedule.geometric(
        num_layers=num_layers,
        start=pruning.start,
        step=pruning.step,
        ratio=ratio,
        sinks=pruning.sinks,
        local=pruning.local,
        min_local=pruning.min_local,
    )


def _check_start(pruning: PruningSettings, num_layers: int) -> None:
    # A `step` past the last layer leaves one stage, which is a schedule.
    if not 1 <= pruning.start < num_layers:
        raise UserError(
            f"pruning.start: {pruning.start} is no layer to prune at; the model has {num_layers} layers, so that 1 to "
            f"{num_layers - 1} are accepted"
        )
