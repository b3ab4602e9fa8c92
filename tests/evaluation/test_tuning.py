"""Which token counts do the least damage at a cost: against every schedule there is, on cases small enough for that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from sdtp.evaluation.costs import Costs
from sdtp.evaluation.tuning import (
    Tuner,
    UnreachableError,
    alone,
    blend,
    floor,
    geometric,
    level_counts,
    schedule_of,
)
from sdtp.pruning.schedule import PruningSchedule

TOKENS = 40
SCHEDULE = PruningSchedule((1, 3, 4), (0.8, 0.6, 0.5), sinks=2, local=0.1, min_local=3)
LAYERS = (2, 1, 3)  # that run behind each stage


def quadratic(scoring: float = 0.0, fixed: float = 100.0) -> Costs:
    """Whole numbers, as long as scoring costs a whole number a token."""
    return Costs(TOKENS, lambda stage, n: LAYERS[stage] * n * (n + 5), lambda n: scoring * n, fixed)


def curves(*rates: float) -> list:
    return [lambda f, rate=rate: rate * (1 / f - 1) for rate in rates]


def every_schedule(counts: np.ndarray) -> Iterator[tuple[int, ...]]:
    """All counts that the schedule can be made to leave, by its own rule."""
    for chosen in itertools.product(counts.tolist(), repeat=SCHEDULE.stages):
        falling = all(a >= b for a, b in itertools.pairwise((TOKENS, *chosen)))
        if falling and schedule_of(SCHEDULE, chosen, TOKENS).surviving(TOKENS) == list(chosen):
            yield chosen


def damage(counts: tuple[int, ...], rates: tuple[float, ...]) -> float:
    """The additive model, written out."""
    entering = (TOKENS, *counts[:-1])
    return sum(rate * (TOKENS / n - TOKENS / before) for rate, n, before in zip(rates, counts, entering, strict=True))


@pytest.mark.parametrize("scoring", [0.0, 90.0])
@pytest.mark.parametrize("rates", [(3.0, 2.0, 1.0), (1.0, 1.0, 1.0), (1.0, 5.0, 0.1), (0.2, 0.1, 6.0)])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.9])
def test_optimum_is_the_best_of_every_schedule(rates: tuple[float, ...], ratio: float, scoring: float) -> None:
    costs = quadratic(scoring)
    budget = ratio * costs.of([TOKENS] * 3)
    # A unit is one: whole costs are not rounded, and the optimum is exact.
    units = math.floor(budget - costs.fixed)
    ratio = (costs.fixed + units) / costs.of([TOKENS] * 3)
    tuner = Tuner(SCHEDULE, costs, curves(*rates), ratio, levels=8, units=units)
    cheap = [c for c in every_schedule(tuner.counts) if costs.of(c) <= costs.fixed + units]
    best = min(cheap, key=lambda counts: damage(counts, rates))
    plan = tuner.solve()
    assert plan is not None
    assert len(cheap) > 10
    assert plan.damage == pytest.approx(damage(best, rates), rel=1e-9, abs=1e-12)
    assert damage(plan.counts, rates) == pytest.approx(plan.damage, abs=1e-12)
    assert tuner.predict(plan.counts) == pytest.approx(plan.damage, abs=1e-12)
    assert costs.ratio(plan.counts) <= ratio * (1 + 1e-9)
    assert schedule_of(SCHEDULE, plan.counts, TOKENS).surviving(TOKENS) == list(plan.counts)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pinned_optimum_is_the_best_of_every_schedule_with_what_is_pinned(stage: int) -> None:
    costs, rates = quadratic(), (1.0, 2.0, 0.5)
    units = math.floor(0.5 * costs.of([TOKENS] * 3) - costs.fixed)
    tuner = Tuner(SCHEDULE, costs, curves(*rates), (costs.fixed + units) / costs.of([TOKENS] * 3), 8, units)
    for level, count in enumerate(tuner.counts):
        cheap = [c for c in every_schedule(tuner.counts) if costs.of(c) <= costs.fixed + units and c[stage] == count]
        plan = tuner.solve({stage: level})
        assert (plan is None) == (not cheap)
        if plan is not None:
            assert plan.counts[stage] == count
            assert plan.damage == pytest.approx(min(damage(c, rates) for c in cheap), abs=1e-12)


@pytest.mark.parametrize("ratio", [0.4, 0.45, 0.5, 0.55, 0.6, 0.65])
def test_rounded_costs_never_exceed_the_target_and_lose_little(ratio: float) -> None:
    costs, rates = quadratic(), (3.0, 2.0, 1.0)
    units = math.floor(ratio * costs.of([TOKENS] * 3) - costs.fixed)
    best = Tuner(SCHEDULE, costs, curves(*rates), ratio, 12, units).solve()
    rounded = Tuner(SCHEDULE, costs, curves(*rates), ratio, 12, 40).solve()
    assert best is not None
    assert rounded is not None
    assert costs.ratio(rounded.counts) <= ratio
    assert best.damage <= rounded.damage <= 1.3 * best.damage


def test_a_stage_that_hurts_much_removes_nothing() -> None:
    plan = Tuner(SCHEDULE, quadratic(), curves(1.0, 1000.0, 0.1), 0.5).solve()
    assert plan is not None
    assert plan.counts[0] == plan.counts[1]
    assert plan.counts[2] < plan.counts[1]


def test_scoring_is_paid_only_where_something_is_removed() -> None:
    costs = quadratic(scoring=10.0)
    assert costs.of([40, 20, 20]) == 100 + 10 * 40 + 2 * 40 * 45 + 1 * 20 * 25 + 3 * 20 * 25
    assert costs.of([40, 40, 40]) == 100 + 6 * 40 * 45
    assert costs.ratio([40, 40, 40]) == 1.0


def test_least_cost_is_that_of_every_schedule_and_what_is_below_is_refused() -> None:
    costs = quadratic()
    tuner = Tuner(SCHEDULE, costs, curves(1, 1, 1), 0.9, levels=8)
    least = min(map(costs.ratio, every_schedule(tuner.counts)))
    assert tuner.least() == pytest.approx(least, rel=1e-12)
    with pytest.raises(UnreachableError, match=f" is out of reach: the least is {least:.4f}") as refused:
        Tuner(SCHEDULE, costs, curves(1, 1, 1), 0.99 * least, levels=8)
    assert refused.value.least == pytest.approx(least)
    with pytest.raises(UnreachableError) as refused:
        geometric(SCHEDULE, costs, 0.99 * least)
    assert refused.value.least == pytest.approx(least)
    assert costs.ratio(geometric(SCHEDULE, costs, least).surviving(TOKENS)) == pytest.approx(least)


def test_wrong_number_of_curves() -> None:
    with pytest.raises(ValueError, match="2 damage curves for 3 stages"):
        Tuner(SCHEDULE, quadratic(), curves(1, 1), 0.5)


def test_moves_are_cheap_enough_and_differ_at_one_stage_by_what_a_move_is() -> None:
    costs = quadratic()
    tuner = Tuner(SCHEDULE, costs, curves(3.0, 2.0, 1.0), 0.6)
    plan = tuner.solve()
    assert plan is not None
    moves = tuner.moves(plan, 4)
    assert len({move.counts for move in moves} | {plan.counts}) == 5
    assert [move.damage for move in moves] == sorted(move.damage for move in moves)
    for move in moves:
        assert move.damage >= plan.damage
        assert 0.55 < costs.ratio(move.counts) <= 0.6
        # To a whole number of tokens, and to no more than there are.
        changes = [(a, b) for a, b in zip(move.counts, plan.counts, strict=True) if a != b]
        assert any(min(abs(a - 0.75 * b), abs(a - min(TOKENS, b / 0.75))) <= 0.5 for a, b in changes)
    assert len(tuner.moves(plan, 1)) == 1


@pytest.mark.parametrize("tokens", [9, 40, 448, 4096])
def test_levels_hold_all_that_stages_can_leave_at_the_least(tokens: int) -> None:
    counts = level_counts(SCHEDULE, tokens, 16)
    assert counts[0] == tokens
    assert (np.diff(counts) < 0).all()
    least = SCHEDULE.with_ratio(1e-6).surviving(tokens)
    assert set(least) <= set(counts.tolist())
    assert counts[-1] == least[-1]
    assert len(counts) <= 16 + 3
    with pytest.raises(ValueError, match="levels is 1"):
        level_counts(SCHEDULE, tokens, 1)


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 30, 448])
def test_floor_is_what_the_schedule_keeps_of_what_is_present(tokens: int) -> None:
    one = PruningSchedule((1,), (1e-6,), sinks=2, local=0.1, min_local=3)
    assert floor(one, tokens) == one.surviving(tokens)[0]


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 50), (0.06, 12)])
def test_alone_prunes_at_one_stage_only_also_where_less_than_what_is_protected_is_asked_for(
    fraction: float, count: int
) -> None:
    # Of 100 tokens 2 + 10 are protected, of 12 only 5: later stages would go on removing.
    for stage, expected in enumerate(([count] * 3, [100, count, count], [100, 100, count])):
        assert alone(SCHEDULE, stage, fraction, 100).surviving(100) == expected


def test_alone_and_schedule_of_replace_a_budget() -> None:
    budget = PruningSchedule((1, 3), (), budget=8)
    assert alone(budget, 1, 0.5, 100).surviving(100) == [100, 50]


def test_geometric_keeps_the_most_that_is_cheap_enough() -> None:
    costs = quadratic()
    found = geometric(SCHEDULE, costs, 0.6)
    assert found.layers == SCHEDULE.layers
    assert found.keep == pytest.approx([found.keep[0] ** s for s in (1, 2, 3)])
    assert costs.ratio(found.surviving(TOKENS)) <= 0.6
    assert costs.ratio(SCHEDULE.with_ratio(found.keep[0] + 2e-9).surviving(TOKENS)) > 0.6


def test_sixty_stages_are_tuned_too() -> None:
    many = PruningSchedule.geometric(64, start=4, step=1, ratio=0.98, sinks=2, local=0.0, min_local=1)
    costs = Costs(500, lambda stage, n: n * (n + 5), lambda n: 0.0, 1000.0)
    ratio = costs.ratio(geometric(many, costs, 0.6).surviving(500))
    assert 0.55 < ratio <= 0.6


def test_blend_lies_between_and_costs_the_same() -> None:
    costs = quadratic()
    steep = schedule_of(SCHEDULE, [40, 13, 13], TOKENS)
    ratio = costs.ratio([40, 13, 13])
    assert blend(steep, 0.0, costs, ratio).keep == pytest.approx(geometric(SCHEDULE, costs, ratio).keep)
    half = blend(steep, 0.5, costs, ratio)
    gradual = geometric(SCHEDULE, costs, ratio)
    assert costs.ratio(half.surviving(TOKENS)) == pytest.approx(ratio, abs=0.03)
    assert costs.ratio(half.surviving(TOKENS)) <= ratio
    assert gradual.keep[0] < half.keep[0] < steep.keep[0]
    # Half the logarithm of each of the plan's steps, and equal ones besides.
    steps = [-math.log(b / a) for a, b in itertools.pairwise((1.0, *half.keep))]
    assert steps[0] == pytest.approx(steps[2])
    assert steps[1] - steps[0] == pytest.approx(0.5 * math.log(40 / 13))
