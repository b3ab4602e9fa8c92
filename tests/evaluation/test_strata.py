"""Means over groups that count by weight: values, intervals and paired tests by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdtp.evaluation import stats, strata

HALVES = [0.5, 0.5]


def test_groups_count_by_weight_whatever_their_size() -> None:
    groups = [[0.0, 0.0, 0.0, 0.0], [100.0]]
    assert strata.mean(groups, HALVES) == 50.0
    assert strata.mean(groups, [0.25, 0.75]) == 75.0


def test_one_group_has_the_interval_and_test_of_its_examples() -> None:
    first, second = [3.0, 5.0, 9.0, 2.0], [1.0, 5.0, 4.0, 3.0]
    assert strata.interval([first], [1.0]) == stats.mean_interval(first)
    assert strata.paired_difference([first], [second], [1.0]) == stats.paired_difference(first, second)


def test_interval_is_as_wide_as_the_spread_within_groups_says() -> None:
    rng = np.random.default_rng(1)
    groups = [list(rng.normal(0, 1, 400)), list(rng.normal(50, 2, 100))]
    low, high = strata.interval(groups, HALVES)
    # Var of the mean: (1/400 + 4/100) / 4; the 50 between the groups is no part of it.
    half = 1.96 * math.sqrt((np.var(groups[0]) / 400 + np.var(groups[1]) / 100) / 4)
    middle = strata.mean(groups, HALVES)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.02)
    # Three quarters on the group of less spread.
    half = 1.96 * math.sqrt(np.var(groups[0]) / 400 * 9 / 16 + np.var(groups[1]) / 100 / 16)
    low, high = strata.interval(groups, [0.75, 0.25])
    assert high - low == pytest.approx(2 * half, abs=0.03)


def test_interval_of_small_groups_has_the_spread_of_their_samples() -> None:
    groups = [[0.0, 1.0, 5.0]] * 8
    low, high = strata.interval(groups, [1 / 8] * 8)
    # Var of a group's mean is 7 / 3, with 2 degrees of freedom; a plain bootstrap has two thirds of it.
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(7 / 3 / 8), rel=0.03)


def test_a_group_of_one_says_nothing_of_its_spread() -> None:
    assert all(map(math.isnan, strata.interval([[1.0, 2.0], [3.0]], HALVES)))


def test_paired_difference_weighs_examples_as_the_mean_does() -> None:
    # Six examples better by 4, one worse by 10 in a group of its own that counts as much.
    first, second = [[4.0] * 6, [0.0]], [[0.0] * 6, [10.0]]
    found = strata.paired_difference(first, second, HALVES)
    assert (found.mean, found.n) == (pytest.approx(-3.0), 7)
    # Whichever way the six point, the one decides: half of all sign patterns are as low. Were all seven to weigh alike,
    # 23 of 128 would be as high as what was seen.
    assert found.p_value == pytest.approx(1.0)
    assert stats.paired_difference([4.0] * 6 + [0.0], [0.0] * 6 + [10.0]).p_value == pytest.approx(46 / 128)
    same = strata.paired_difference(second, second, HALVES)
    assert (same.mean, same.p_value) == (0.0, 1.0)
    better = strata.paired_difference([[1.0] * 6, [1.0] * 6], [[0.0] * 6, [0.0] * 6], HALVES, right=1.0)
    assert better.p_value == pytest.approx(2 / 2**12, rel=0.5)
    low = 12 / 14 - 1.959964 * math.sqrt((1 - (12 / 14) ** 2) / 14)  # Bonett and Price's, of twelve
    assert (better.low, better.high) == pytest.approx((low, 1.0))


def test_answers_right_or_wrong_of_even_groups_are_compared_as_one() -> None:
    first, second = [[100.0, 0.0, 100.0], [0.0, 0.0, 100.0]], [[100.0, 0.0, 100.0], [0.0, 100.0, 100.0]]
    alike = strata.paired_difference(first, first, HALVES, right=100.0)
    assert alike.high == -alike.low == pytest.approx(100 * 1.959964 * math.sqrt(2 / 8 / 8))
    pair = strata.paired_difference(first, second, HALVES, right=100.0)
    assert (pair.low, pair.high) == stats.difference_interval([*first[0], *first[1]], [*second[0], *second[1]], 100.0)
    assert pair.low < -100 / 6 < pair.high
    # Of answers that are partly right it is the bootstrap's.
    groups, other = [[25.0, 100.0], [0.0, 0.0]], [[100.0, 0.0], [0.0, 0.0]]
    found = strata.paired_difference(groups, other, HALVES, right=100.0)
    assert (found.low, found.high) == strata.interval([[-75.0, 100.0], [0.0, 0.0]], HALVES)


def test_answers_right_or_wrong_of_uneven_groups_have_two_more_in_each() -> None:
    groups, other = [[0.0, 100.0], [0.0, 0.0, 100.0]], [[100.0, 0.0], [0.0, 0.0, 100.0]]
    found = strata.paired_difference(groups, other, HALVES, right=100.0)
    # Of -100, 100 and of 0, 0, 0, each with 100 and -100 more: variances of 10,000 over 4 and of 4,000 over 5.
    half = 1.959964 * math.sqrt((10_000 / 4 + 4_000 / 5) / 4)
    assert (found.low, found.high) == pytest.approx((-half, half))
    alike = strata.paired_difference(groups, groups, HALVES, right=100.0)
    assert alike.low < -30 < 30 < alike.high


def test_proportions_of_one_group_have_wilsons_interval_and_of_alike_ones_nearly_that_of_all() -> None:
    values = [100.0] * 13 + [0.0] * 7
    low, high = stats.wilson_interval([value / 100 for value in values])
    assert strata.proportion_interval([values], [1.0], 100.0) == pytest.approx((100 * low, 100 * high))
    low, high = stats.wilson_interval([value / 100 for value in values * 2])
    assert strata.proportion_interval([values, values], HALVES, 100.0) == pytest.approx((100 * low, 100 * high))
    nearly = strata.proportion_interval([values, values], [0.49, 0.51], 100.0)
    assert nearly == pytest.approx((100 * low, 100 * high), abs=1.0)
    # Of groups as large as each other that weigh otherwise it is about their own mean.
    low, high = strata.proportion_interval([[1.0] * 20, [0.0] * 20], [0.9, 0.1], 1.0)
    assert 0.5 < low < 0.9 < high
    # All right is no proof that all would be.
    low, high = strata.proportion_interval([[1.0] * 3, [1.0] * 4], HALVES, 1.0)
    assert (high, low < 0.75) == (1.0, True)


@pytest.mark.parametrize("shares", [(0.9, 0.5, 0.95), (0.3, 0.6, 0.1)])
def test_an_interval_of_uneven_proportions_covers_95_times_in_100(shares: tuple[float, ...]) -> None:
    rng, sizes, weights = np.random.default_rng(5), (8, 15, 40), [1 / 3] * 3
    true, covered = float(np.mean(shares)), 0
    for _ in range(2000):
        groups = [(rng.random(n) < share).astype(float).tolist() for n, share in zip(sizes, shares, strict=True)]
        low, high = strata.proportion_interval(groups, weights, 1.0)
        covered += low <= true <= high
    assert 0.93 <= covered / 2000 <= 0.98


def test_wrong_groups_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups of \[1, 0\] values"):
        strata.mean([[1.0], []], HALVES)
    with pytest.raises(ValueError, match=r"groups of \[\] values"):
        strata.interval([], [])
    with pytest.raises(ValueError, match="one each, summing to 1"):
        strata.mean([[1.0], [2.0]], [0.5, 0.6])
    with pytest.raises(ValueError, match="one each, summing to 1"):
        strata.mean([[1.0], [2.0]], [1.0])
    with pytest.raises(ValueError, match="the same examples"):
        strata.paired_difference([[1.0]], [[1.0, 2.0]], [1.0])
