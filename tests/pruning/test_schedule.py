from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtp.pruning.schedule import PruningSchedule


def test_geometric_stages_of_the_reference_model():
    schedule = PruningSchedule.geometric(num_layers=28, start=4, step=3, ratio=0.9)
    assert schedule.layers == (4, 7, 10, 13, 16, 19, 22, 25)
    assert schedule.surviving(1000) == [900, 810, 729, 656, 590, 531, 478, 430]


@given(
    n=st.integers(1, 5000),
    ratio=st.floats(0.05, 1.0),
    stages=st.integers(1, 12),
    sinks=st.integers(0, 8),
    local=st.floats(0, 0.5),
    min_local=st.integers(0, 40),
)
def test_counts_are_the_rounded_budget_within_protection(n, ratio, stages, sinks, local, min_local):
    schedule = PruningSchedule.geometric(
        num_layers=stages + 1, start=1, step=1, ratio=ratio, sinks=sinks, local=local, min_local=min_local
    )
    present = n
    for stage, count in enumerate(schedule.surviving(n), start=1):
        tail = min(present, max(min_local, math.ceil(local * present)))
        head = min(sinks, n)
        protected = len(set(range(head)) | set(range(present - tail, present)))
        assert count == min(present, max(round(ratio**stage * n), protected, 1))
        present = count


@pytest.mark.parametrize("ratio", [0.4, 0.01])
def test_short_prompts_never_lose_every_token(ratio):
    schedule = PruningSchedule(layers=(1,), keep=(ratio,), sinks=0, local=0.0, min_local=0)
    expected = {0.4: [1, 1, 1, 4], 0.01: [1, 1, 1, 1]}[ratio]
    assert [schedule.surviving(n)[0] for n in (1, 2, 3, 9)] == expected


def test_half_of_a_short_prompt_is_half():
    assert PruningSchedule((1,), (0.5,), sinks=4, local=0.1, min_local=16).surviving(50) == [25]


def test_prompts_below_the_minimum_are_left_alone():
    schedule = PruningSchedule((1, 2), (0.5, 0.25), min_local=1, min_tokens=50)
    assert schedule.surviving(49) == [49, 49]
    assert schedule.surviving(50) == [25, 12]


def test_layer_lengths_step_down_at_the_stages():
    schedule = PruningSchedule((1, 3), (0.5, 0.25), sinks=0, local=0.0, min_local=1)
    assert schedule.layer_lengths(100, 5) == [100, 50, 50, 25, 25]


def test_a_budget_is_reached_in_equal_shares():
    protection = {"sinks": 0, "local": 0.0, "min_local": 1, "min_tokens": 2}
    schedule = PruningSchedule.to_budget(num_layers=8, start=1, step=3, tokens=64, **protection)
    assert schedule == PruningSchedule((1, 4, 7), budget=64, **protection)
    assert schedule.surviving(512) == [256, 128, 64]
    assert schedule.layer_lengths(512, 8) == [512, 256, 256, 256, 128, 128, 128, 64]
    assert schedule.surviving(65) == [65, 64, 64]
    assert schedule.surviving(64) == [64, 64, 64]
    assert schedule.surviving(3) == [3, 3, 3]
    # A row of padding alone.
    assert PruningSchedule((1,), budget=64).kept_at(0, prompt_tokens=0, present=0, protected=0) == 0


@given(n=st.integers(1, 200_000), budget=st.integers(1, 5000), stages=st.integers(1, 40))
def test_a_budget_is_what_the_last_stage_leaves(n, budget, stages):
    schedule = PruningSchedule(tuple(range(1, stages + 1)), budget=budget, sinks=0, local=0.0, min_local=0)
    counts = [n, *schedule.surviving(n)]
    assert counts[-1] == min(n, budget)
    assert counts == sorted(counts, reverse=True)
    # Rounded once from the exact count, so that no stage is more than half a token off an equal share.
    equal = [n * min(1.0, budget / n) ** (stage / stages) for stage in range(stages + 1)]
    assert counts == pytest.approx(equal, abs=0.5 + 1e-6)


def test_a_budget_gives_way_to_protected_tokens_and_short_prompts_like_fractions():
    schedule = PruningSchedule((1, 2), budget=10, sinks=4, local=0.1, min_local=16)
    assert schedule.surviving(1000) == [104, 20]  # 4 sinks and a tail of 100, then of 16
    assert schedule.kept_at(1, prompt_tokens=1000, present=100, protected=37) == 37
    assert schedule.kept_at(1, prompt_tokens=1000, present=100, protected=0) == 10
    whole = PruningSchedule((1, 2), budget=10, min_local=1, min_tokens=50)
    assert whole.surviving(49) == [49, 49]
    assert whole.surviving(50) == [22, 10]


@pytest.mark.parametrize(
    "schedule",
    [
        PruningSchedule((1, 4, 5), (0.9, 0.8, 0.3), sinks=2, local=0.2, min_local=3, min_tokens=7),
        PruningSchedule((1, 4, 5), budget=30, sinks=2, local=0.2, min_local=3, min_tokens=7),
    ],
)
def test_another_ratio_keeps_layers_and_protection(schedule):
    expected = PruningSchedule((1, 4, 5), (0.5, 0.25, 0.125), sinks=2, local=0.2, min_local=3, min_tokens=7)
    assert schedule.with_ratio(0.5) == expected
    assert schedule.with_ratio(1.0).surviving(100) == [100, 100, 100]
    for ratio in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"ratio is {ratio}: the fraction to keep must be in"):
            schedule.with_ratio(ratio)


@pytest.mark.parametrize(
    "schedule",
    [
        PruningSchedule.geometric(num_layers=30, start=4, step=3, ratio=0.8),
        PruningSchedule.to_budget(num_layers=30, start=4, step=3, tokens=512, sinks=2),
    ],
)
def test_survives_json(schedule):
    assert PruningSchedule(**json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (0, 2)}, "layer 1 or later"),
        ({"layers": (2, 2)}, "ascending"),
        ({"layers": (1.0, 2)}, "whole numbers"),
        ({"layers": (3,)}, "one per layer"),
        ({"keep": (0.5, 0.0)}, r"\(0, 1\]"),
        ({"keep": (0.5, 0.6)}, "earlier"),
        ({"keep": (1.5, 0.6)}, r"\(0, 1\]"),
        ({"local": 1.5}, "local is 1.5"),
        ({"sinks": -1}, "sinks is -1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"keep": ()}, "0 fractions for 2 layers: give one per layer, or a budget"),
        ({"budget": 5}, r"keep is \(0.5, 0.4\) with a budget of 5"),
        ({"keep": (), "budget": 0}, "budget is 0: .* whole number >= 1"),
        ({"keep": (), "budget": 5.0}, "budget is 5.0: .* whole number >= 1"),
        ({"keep": (), "budget": True}, "budget is True: .* whole number >= 1"),
        ({"keep": (), "budget": 5, "layers": ()}, "budget is 5 with no layers"),
        ({"keep": (), "budget": 5, "layers": (2, 1)}, "ascending"),
    ],
)
def test_bad_values_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        PruningSchedule(**{"layers": (1, 2), "keep": (0.5, 0.4), **change})


@pytest.mark.parametrize(("start", "step", "ratio"), [(0, 1, 0.9), (4, 1, 0.9), (1, 0, 0.9), (1, 1, 0.0), (1, 1, 1.1)])
def test_geometric_refuses_what_it_cannot_mean(start, step, ratio):
    with pytest.raises(ValueError, match="is"):
        PruningSchedule.geometric(num_layers=4, start=start, step=step, ratio=ratio)


@pytest.mark.parametrize(
    ("start", "step", "tokens", "name"), [(4, 1, 9, "start"), (1, 0, 9, "step"), (1, 1, 0, "budget")]
)
def test_to_budget_refuses_what_it_cannot_mean(start, step, tokens, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        PruningSchedule.to_budget(num_layers=4, start=start, step=step, tokens=tokens)


def test_a_layer_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match="0 to 3 only"):
        PruningSchedule((4,), (0.5,)).layer_lengths(10, 4)
