"""A mean over groups of examples, each with a weight of its own, its interval, and two methods compared by it.

LongBench's categories are such means: of their tasks' means, whatever each task's number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from sdtp.evaluation import stats
from sdtp.evaluation.stats import LEVEL, RESAMPLES, SEED, PairedDifference, Z

# The values of each group's examples.
Groups = Sequence[Sequence[float]]


def mean(groups: Groups, weights: Sequence[float]) -> float:
    """The weighted mean of the groups' means.

    Args:
        groups: at least one, each of at least one value.
        weights: of the groups, summing to 1.

    Raises:
        ValueError: groups or weights that are not that.
    """
    _check(groups, weights)
    return math.fsum(weight * math.fsum(values) / len(values) for weight, values in zip(weights, groups, strict=True))


def interval(groups: Groups, weights: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of `mean`, every group resampled within itself; (nan, nan) where one has a single value.

    Of one group it is `stats.mean_interval`; of several the percentile interval. A mean of n values resampled varies by
    (n - 1) / n of what it should, which is not little for the few examples of a group: its deviations are drawn out.

    Raises:
        ValueError: as `mean`.
    """
    _check(groups, weights)
    if len(groups) == 1:
        return stats.mean_interval(groups[0])
    if any(len(values) == 1 for values in groups):
        return math.nan, math.nan
    rng = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for weight, values in zip(weights, groups, strict=True):
        sample = np.asarray(values, dtype=np.float64)
        resampled = sample[rng.integers(sample.size, size=(RESAMPLES, sample.size))].mean(axis=1)
        means += weight * (sample.mean() + (resampled - sample.mean()) * math.sqrt(sample.size / (sample.size - 1)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def proportion_interval(groups: Groups, weights: Sequence[float], right: float) -> tuple[float, float]:
    """95% interval of `mean` where each value is that of a right answer or 0: stratified Wilson (Yan and Su 2010).

    Where every example weighs as much it is Wilson's of all. Else each group has Wilson's at a smaller z, with which
    their weighted sum is as wide as it should be; the variance of a group is that of Agresti and Coull (1998), which is
    not 0 where all are right.

    Args:
        groups, weights: as `mean` takes them.
        right: the value of a right answer.

    Raises:
        ValueError: as `mean`; a value outside [0, right].
    """
    _check(groups, weights)
    if _is_even(groups, weights):
        low, high = stats.wilson_interval([value / right for values in groups for value in values])
        return right * low, right * high
    errors = []
    for values in groups:
        n = len(values) + Z * Z
        share = (math.fsum(values) / right + Z * Z / 2) / n
        errors.append(math.sqrt(share * (1 - share) / n))
    products = [weight * error for weight, error in zip(weights, errors, strict=True)]
    z = Z * math.hypot(*products) / math.fsum(products)
    bounds = [stats.wilson_interval([value / right for value in values], z) for values in groups]
    low, high = (math.fsum(w * bound[side] for w, bound in zip(weights, bounds, strict=True)) for side in (0, 1))
    return right * low, right * high


def paired_difference(
    first: Groups, second: Groups, weights: Sequence[float], right: float | None = None
) -> PairedDifference:
    """Compare two methods by `mean`, example by example.

    Args:
        first, second: the values of each group's examples, the same examples in the same order.
        weights: of the groups, summing to 1.
        right: see `stats.difference_interval`.

    Returns:
        The difference of the means, its interval, and the p-value of the sign-flip permutation test, in which a group's
        examples weigh as much as they do in the mean. The interval is `interval` of the differences; but of answers
        that are each right or wrong, `stats.difference_interval` over all of them, where every example weighs as much,
        and else the normal one of the groups' means with its two more examples in each: these hold where few differ.

    Raises:
        ValueError: the groups differ in number or length; as `mean`.
    """
    if [len(values) for values in first] != [len(values) for values in second]:
        raise ValueError(
            f"groups of {[len(values) for values in first]} and {[len(values) for values in second]} values: a paired "
            "comparison needs the same examples"
        )
    _check(first, weights)
    if len(first) == 1:
        return stats.paired_difference(first[0], second[0], right)
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    count = sum(len(values) for values in differences)
    every_first, every_second = list(chain.from_iterable(first)), list(chain.from_iterable(second))
    if right is None or not stats.right_or_wrong(every_first, every_second, right):
        low, high = interval(differences, weights)
    elif _is_even(first, weights):
        low, high = stats.difference_interval(every_first, every_second, right)
    else:
        low, high = _answers_interval(differences, weights, right)
    weighted = np.array(
        [
            value * count * weight / len(values)
            for weight, values in zip(weights, differences, strict=True)
            for value in values
        ]
    )
    return PairedDifference(mean(differences, weights), low, high, stats.sign_flip_p_value(weighted), count)


def _answers_interval(differences: Groups, weights: Sequence[float], right: float) -> tuple[float, float]:
    found = [stats.with_one_each(np.asarray(values), right) for values in differences]
    middle = math.fsum(weight * mean for weight, (mean, _) in zip(weights, found, strict=True))
    half = Z * math.hypot(*(weight * error for weight, (_, error) in zip(weights, found, strict=True)))
    return max(-right, middle - half), min(right, middle + half)


def _is_even(groups: Groups, weights: Sequence[float]) -> bool:
    """Whether every example weighs as much in the mean."""
    count = sum(len(values) for values in groups)
    return all(math.isclose(weight * count, len(values)) for weight, values in zip(weights, groups, strict=True))


def _check(groups: Groups, weights: Sequence[float]) -> None:
    if not groups or not all(len(values) for values in groups):
        raise ValueError(f"groups of {[len(values) for values in groups]} values: each of at least one needs some")
    if len(weights) != len(groups) or not math.isclose(math.fsum(weights), 1.0):
        raise ValueError(f"weights {list(weights)} of {len(groups)} groups: one each, summing to 1, is needed")
