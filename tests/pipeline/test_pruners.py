"""A pruner read for a keep ratio: what may differ between its own schedule and the settings', and what may not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.pruners import at_ratio, read_pruner, read_pruner_at, read_tuned
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

PRUNING = Settings.from_mapping(
    {"pruning": {"start": 1, "step": 2, "sinks": 2, "local": 0.1, "min_local": 3}}
).pruning  # layers 1, 3 and 5 of six
OWN = PruningSchedule.geometric(6, 1, 2, 0.8, sinks=2, local=0.1, min_local=3)
TUNED = dataclasses.replace(OWN, keep=(1.0, 0.5, 0.4))


def saved(folder: Path, schedule: PruningSchedule, **told: Any) -> Path:
    TokenPruner(schedule, scorers.Recent()).save_pretrained(folder)
    if told:
        (folder / "tuning.json").write_text(json.dumps(told))
    return folder


def test_the_keep_ratio_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    pruner = read_pruner_at(saved(tmp_path, OWN), PRUNING, 6, 0.5)
    assert pruner.schedule == dataclasses.replace(OWN, keep=(0.5, 0.25, 0.125))


def test_a_pruner_that_was_read_once_serves_every_keep_ratio(tmp_path: Path) -> None:
    pruner = read_pruner(saved(tmp_path, OWN))
    for ratio in (0.9, 0.5):
        served = at_ratio(pruner, tmp_path, PRUNING, 6, ratio)
        assert served.schedule == read_pruner_at(tmp_path, PRUNING, 6, ratio).schedule
        assert served.scorer is pruner.scorer
    assert pruner.schedule == OWN


def test_a_tuned_pruner_keeps_its_own_fractions(tmp_path: Path) -> None:
    assert read_tuned(saved(tmp_path, TUNED, keep_ratio=0.8), PRUNING, 6, 0.8).schedule == TUNED


DIFFERENCES = [
    ({"layers": (1, 2, 5)}, r"layers \(1, 2, 5\) and not \(1, 3, 5\)"),
    ({"sinks": 4, "min_local": 16}, "sinks 4 and not 2, min_local 16 and not 3"),
    ({"local": 0.2}, "local 0.2 and not 0.1"),
    ({"min_tokens": 10}, "min_tokens 10 and not 0"),
    ({"keep": (), "budget": 8}, "budget 8 and not None"),
]


@pytest.mark.parametrize(("change", "told"), DIFFERENCES)
def test_other_layers_and_other_protected_tokens_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    saved(tmp_path, dataclasses.replace(OWN, **change), keep_ratio=0.8)
    message = (
        rf"^{tmp_path}: the schedule of this pruner is another than that of the settings, block pruning: {told}; only "
    )
    for read in (read_pruner_at, read_tuned):
        with pytest.raises(UserError, match=message):
            read(tmp_path, PRUNING, 6, 0.8)


def test_another_number_of_layers_gives_other_stages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers \(1, 3, 5\) and not \(1, 3\)"):
        read_pruner_at(saved(tmp_path, OWN), PRUNING, 5, 0.8)


def test_a_keep_ratio_does_not_replace_what_was_tuned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leave 1, 0\.5, 0\.4 of a prompt, .* ratio, 0\.8, would replace .*sdtp-tuned"):
        read_pruner_at(saved(tmp_path, TUNED, keep_ratio=0.8), PRUNING, 6, 0.8)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, r": has no tuning\.json; method sdtp-tuned needs a pruner that was tuned$"),
        ({"keep_ratio": 0.9}, r"/tuning\.json: keep_ratio is 0\.9; a pruner that was tuned for 0\.8 is needed$"),
        ({"keep_ratio": None}, r"/tuning\.json: keep_ratio is None; "),
        ({"ratio": 0.5}, r"/tuning\.json: says no keep_ratio"),
    ],
)
def test_a_pruner_that_was_not_tuned_for_the_ratio_is_refused(
    tmp_path: Path, told: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_tuned(saved(tmp_path, TUNED, **told), PRUNING, 6, 0.8)
