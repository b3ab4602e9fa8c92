"""Intervals and paired comparisons, against scipy's own and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sdtp.evaluation.stats import (
    difference_interval,
    holm,
    mean_interval,
    paired_difference,
    paired_ratios,
    quartiles,
    retained_loss,
    retained_share,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "n"), [(0, 28), (1, 28), (17, 28), (28, 28), (3, 200), (1, 1)])
def test_wilson_interval_is_scipys(right: int, n: int) -> None:
    expected = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval([1.0] * right + [0.0] * (n - right)) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_wilson_interval_takes_shares_of_seeds() -> None:
    assert wilson_interval([1.0, 0.5, 0.5, 0.0]) == pytest.approx(wilson_interval([1.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("values", [[], [0.5, 1.2], [-0.1]])
def test_wilson_interval_refuses_what_is_no_share(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"each in \[0, 1\]"):
        wilson_interval(values)


@pytest.mark.parametrize("n", [6, 12, 28])
def test_mean_interval_covers_the_mean_95_times_in_100(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr("sdtp.evaluation.stats.RESAMPLES", 999)
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(600):
        low, high = mean_interval(rng.normal(2.0, 1.0, n).tolist())
        hits += low <= 2.0 <= high
    assert 0.93 <= hits / 600 <= 0.975


def test_mean_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(5).normal(3.0, 0.4, 200)
    low, high = mean_interval(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / math.sqrt(200), rel=0.1)
    assert low < values.mean() < high
    assert mean_interval(values.tolist()) == (low, high)  # the resampling is seeded


def test_mean_interval_without_spread() -> None:
    assert mean_interval([2.5, 2.5, 2.5]) == (2.5, 2.5)
    assert all(math.isnan(bound) for bound in mean_interval([2.5]))
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_paired_difference_sees_what_the_spread_of_examples_hides() -> None:
    hard = np.linspace(1.0, 6.0, 28)  # examples differ far more than the methods do
    better = hard - 0.1 + 0.02 * np.sin(np.arange(28))
    result = paired_difference(better.tolist(), hard.tolist())
    assert result.mean == pytest.approx(-0.1, abs=0.01)
    assert -0.12 < result.low < result.mean < result.high < -0.08
    assert result.p_value < 0.001
    assert result.n == 28


def test_paired_difference_of_equals_is_none() -> None:
    assert paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]).p_value == 1.0


def test_paired_difference_p_value_is_exact_for_few_examples() -> None:
    # 3 differences of one sign: 2 of the 8 sign patterns are as extreme.
    assert paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p_value == pytest.approx(0.25)


def test_paired_difference_of_one_example_shows_nothing() -> None:
    result = paired_difference([1.0], [0.0])
    assert (result.mean, result.p_value, result.n) == (1.0, 1.0, 1)
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def enumerated_rates(n: int, discordant: float) -> tuple[float, float]:
    """How often the interval of two equal methods' answers leaves out 0: ours, and that of resampling."""
    ours = resampled = 0.0
    for first in range(9):
        for second in range(9):
            chance = scipy_stats.multinomial.pmf(
                [first, second, n - first - second], n, [discordant / 2 / n, discordant / 2 / n, 1 - discordant / n]
            )
            one = [1.0] * first + [0.0] * (n - first)
            other = [0.0] * first + [1.0] * second + [0.0] * (n - first - second)
            ours += chance * _leaves_out_0(difference_interval(one, other, 1.0))
            resampled += chance * _leaves_out_0(mean_interval(np.subtract(one, other).tolist()))
    return ours, resampled


def _leaves_out_0(interval: tuple[float, float]) -> bool:
    return interval[0] > 0 or interval[1] < 0


def test_interval_of_right_and_wrong_is_bonetts_and_prices() -> None:
    # 5 of 20 only the first gets right, 1 only the second: (6 - 2) / 22 and sqrt((8 / 22 - (4 / 22)²) / 22).
    first, second = [1.0] * 5 + [0.0] + [1.0] * 14, [0.0] * 5 + [1.0] + [1.0] * 14
    middle, half = 4 / 22, 1.959964 * math.sqrt((8 / 22 - (4 / 22) ** 2) / 22)
    assert difference_interval(first, second, 1.0) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert difference_interval([1.0] * 3, [0.0] * 3, 1.0)[1] == 1.0
    # Equal answers are no proof that all would be.
    low, high = difference_interval([1.0] * 50, [1.0] * 50, 1.0)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(1.959964 * math.sqrt(2 / 52 / 52), abs=1e-6)
    # Values that are no answers may be 0 and 1 as well, as a divergence where nothing differs.
    assert difference_interval([0.0] * 12, [0.0] * 12) == (0.0, 0.0)


@pytest.mark.slow
def test_few_answers_that_differ_seldom_leave_out_0_by_chance() -> None:
    ours, resampled = enumerated_rates(200, 4.0)
    assert ours < 0.05 < resampled


def test_losses_have_the_bootstrap_interval_of_their_differences() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(3, 1, 40), rng.normal(3, 1, 40)
    assert difference_interval(first.tolist(), second.tolist()) == mean_interval((first - second).tolist())


def test_how_many_resamples_are_drawn_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(3, 1, 40).tolist(), rng.normal(3.2, 1, 40).tolist()
    whole = paired_difference(first, second)
    monkeypatch.setattr("sdtp.evaluation.stats._DRAWN", 40 * 7)
    assert paired_difference(first, second) == whole


def test_paired_difference_needs_the_same_examples() -> None:
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_holm_by_hand_in_the_order_of_its_arguments() -> None:
    # Ascending 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, which may not fall below the 0.06 before them.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.01, 0.01, 0.5]) == pytest.approx([0.03, 0.03, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_ratios_are_paired_before_the_median() -> None:
    # The machine slowed down by half for the second pair; the medians' ratio would be 2.0 / 1.5.
    low, middle, high = paired_ratios([1.5, 3.0, 2.0], [1.0, 2.0, 1.0])
    assert (low, middle, high) == (1.5, 1.5, 1.75)
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0, 2.0], [1.0])


def test_quartiles() -> None:
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_retained() -> None:
    assert retained_share(0.6, 0.8) == pytest.approx(0.75)
    assert math.isnan(retained_share(0.0, 0.0))
    assert retained_loss(3.2, 3.0) == pytest.approx(math.exp(-0.2))  # a higher loss retains less
