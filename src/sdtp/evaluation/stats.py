"""Intervals, quartiles and paired comparisons of what was measured."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))
RESAMPLES = 9999
SEED = 0  # of the resampling, so that a table is the same however often it is made
_DRAWN = 2**22  # numbers drawn at a time; how many changes no result


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of times that ran side by side.

    Raises:
        ValueError: the lists differ in length, so that nothing is paired.
    """
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of one or more values, by linear interpolation."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def wilson_interval(values: Sequence[float], z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), of 95% with the z that is taken where none is given.

    Args:
        values: one number in [0, 1] per example: right or wrong, or the share of several seeds that were right. A mean
            over seeds varies less than one seed, so that for shares the interval is a little too wide.
        z: quantile of the normal distribution, above 0.

    Raises:
        ValueError: no values, or one outside [0, 1].
    """
    n = len(values)
    if n == 0 or not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"{n} values, {list(values)[:5]} ...: at least one is needed, each in [0, 1]")
    share = math.fsum(values) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is exactly the share; rounding may put it a hair beyond.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval (BCa, Efron 1987) of a mean; (nan, nan) for one value, which says nothing of the spread.

    A mean of n values resampled varies by (n - 1) / n of what it should, and knows nothing of how uncertain the spread
    of a few is: the bounds are drawn out from the mean by the square root of that and by Student's t over the normal
    quantile, 1.17 times in all at n = 12 and 1.004 at 400.

    Raises:
        ValueError: no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("no values: a mean needs at least one")
    if sample.size == 1:
        return math.nan, math.nan
    if np.all(sample == sample[0]):  # BCa divides by the spread
        return float(sample[0]), float(sample[0])
    interval = stats.bootstrap(
        (sample,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", rng=SEED, batch=_batch(sample)
    ).confidence_interval
    mean, drawn = float(sample.mean()), _drawn_out(sample.size)
    return mean - (mean - float(interval.low)) * drawn, mean + (float(interval.high) - mean) * drawn


def _drawn_out(n: int) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) / Z * math.sqrt(n / (n - 1))


def difference_interval(
    first: Sequence[float], second: Sequence[float], right: float | None = None
) -> tuple[float, float]:
    """95% interval of the mean of first minus second; (nan, nan) for one example.

    Of answers that are each right or wrong it is that of Bonett and Price (2012): two examples are added, one that only
    the first gets right and one that only the second does. Where few examples differ, or none, resampling them would
    call it proven that few do. Of other values it is `mean_interval` of the differences.

    Args:
        first, second: one value per example, the same examples in the same order.
        right: the value of a right answer; that of a wrong one is 0. None: they are no answers, whatever their values.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    differences = _differences(first, second)
    if right is None or len(differences) < 2 or not right_or_wrong(first, second, right):
        return mean_interval(differences.tolist())
    mean, error = with_one_each(differences, right)
    return max(-right, mean - Z * error), min(right, mean + Z * error)


def with_one_each(differences: np.ndarray, right: float) -> tuple[float, float]:
    """Mean and standard error of paired differences [n] of answers with two more, `right` and its opposite."""
    sample = np.append(differences, [right, -right])
    return float(sample.mean()), float(sample.std()) / math.sqrt(sample.size)


def right_or_wrong(first: Iterable[float], second: Iterable[float], right: float) -> bool:
    """Whether every value of either is that of a right answer, or 0, that of a wrong one."""
    return {*first, *second} <= {0.0, right}


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """How two methods differ on the same examples.

    Attributes:
        mean: mean of first minus second.
        low, high: its 95% interval, see `difference_interval`.
        p_value: two-sided, of the sign-flip permutation test of no difference.
        n: examples.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n: int


def shown(low: float, high: float, p_value: float) -> bool:
    """Whether a paired difference is shown, at 95%: its interval leaves out 0 and the sign-flip test says so too.

    Of a handful of examples that happen to agree either alone may make too much. One without an interval (a single
    example) is not.

    Args:
        low, high, p_value: of the difference, see `PairedDifference`.
    """
    return (low > 0 or high < 0) and p_value <= 1 - LEVEL


def paired_difference(first: Sequence[float], second: Sequence[float], right: float | None = None) -> PairedDifference:
    """Compare two methods example by example.

    Args:
        first, second, right: see `difference_interval`.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    differences = _differences(first, second)
    low, high = difference_interval(first, second, right)
    return PairedDifference(float(differences.mean()), low, high, sign_flip_p_value(differences), len(first))


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: a paired comparison needs the same examples")
    return np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of the sign-flip permutation test that a mean of paired differences [n] is 0."""
    # One example's sign flipped leaves it as far from 0.
    if differences.size < 2 or not np.any(differences != 0.0):
        return 1.0
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES, rng=SEED,
        batch=_batch(differences),
    )  # fmt: skip
    return float(test.pvalue)


def _batch(sample: np.ndarray) -> int:
    """How many resamples of it are drawn at a time: all together take 0.6 MB for each example."""
    return max(1, _DRAWN // sample.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having been looked at together, in the order they came in (Holm 1979).

    Calling a difference real where its adjusted value is at most `a` leaves a chance of at most `a` that any one of the
    family is called so by mistake.
    """
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(value) for value in adjusted]


def retained_share(value: float, unpruned: float) -> float:
    """What is left of a score: 1 is as good as unpruned; nan where unpruned scored 0, of which no share can be kept."""
    return value / unpruned if unpruned else math.nan


def retained_loss(value: float, unpruned: float) -> float:
    """What is left for mean losses in nats: exp of unpruned minus value, the ratio of geometric mean probabilities."""
    return math.exp(unpruned - value)
