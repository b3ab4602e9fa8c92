"""The settings' schedule, and its refusal by a model with fewer layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.config import PruningSettings
from sdtp.pipeline.schedules import build_schedule, stage_layers
from sdtp.pruning.schedule import PruningSchedule


def settings(start: int = 4, step: int = 3) -> PruningSettings:
    values = {"start": start, "step": step, "sinks": 2, "local": 0.2, "min_local": 8}
    return PruningSettings.from_mapping(values, "pruning")


def test_schedule_of_the_settings() -> None:
    expected = PruningSchedule(layers=(4, 7, 10), keep=(0.5, 0.25, 0.125), sinks=2, local=0.2, min_local=8)
    assert build_schedule(settings(), num_layers=12, ratio=0.5) == expected


def test_layers_need_no_other_setting() -> None:
    assert stage_layers(PruningSettings.from_mapping({"start": 1, "step": 2}, "pruning"), 6) == (1, 3, 5)


def test_step_beyond_the_last_layer_leaves_one_stage() -> None:
    assert stage_layers(settings(start=4, step=40), 12) == (4,)


@pytest.mark.parametrize("build", [stage_layers, lambda pruning, layers: build_schedule(pruning, layers, 0.5)])
def test_start_beyond_the_model_is_named_with_what_it_has(build: Callable[[PruningSettings, int], object]) -> None:
    assert build(settings(start=11), 12)
    with pytest.raises(UserError, match=r"pruning\.start: 12 .* the model has 12 layers, so that 1 to 11 are accepted"):
        build(settings(start=12), 12)
