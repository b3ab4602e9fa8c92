"""Which measured setting meets a target at the least loss of the other side: measurements in, a choice out.

The other side of time and of memory is quality; that of quality is time. What is held against a target is the cautious
end of what was measured: the upper quartile of a time, the lower 95% bound of the quality kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from sdtp.evaluation.stats import LEVEL, mean_interval, retained_loss, retained_share

Kind = Literal["ttft", "ttft_ratio", "memory", "quality"]
UNPRUNED = "unpruned"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a setting costs on prompts of one length.

    Attributes:
        prompt_tokens: the length.
        ttft_s, ttft_q25, ttft_q75: seconds to the first token, which is the prefill: median and quartiles of repeats.
        ttft_ratio, ttft_ratio_q75: the same as a share of the unpruned time beside it: median and upper quartile.
        peak_memory_bytes: weights included, of prefill and decoding; NaN where it could not be measured.
        kv_cache_bytes: after prefill.
        repeats: timings.
        between: the measured lengths on both sides, where this one was not measured.
    """

    prompt_tokens: int
    ttft_s: float
    ttft_q25: float
    ttft_q75: float
    ttft_ratio: float
    ttft_ratio_q75: float
    peak_memory_bytes: float
    kv_cache_bytes: float
    repeats: int
    between: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a task keeps of the unpruned quality, on the same examples.

    Attributes:
        value: pruned over unpruned, as `retained` in quality.csv; 1 is as good as unpruned.
        low, high: its 95% interval; (0, inf) where the examples say nothing.
        n: examples.
    """

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """One measured way to run the model.

    Attributes:
        method: what prunes; `UNPRUNED` for nothing.
        keep_ratio: share of the tokens each stage keeps; 1 for unpruned.
        cost: at the prompt length asked for.
        kept: by task, at least one.
    """

    method: str
    keep_ratio: float
    cost: Cost
    kept: Mapping[str, Kept]

    @property
    def quality(self) -> float:
        """The task that keeps least; more than the unpruned quality counts as all of it."""
        return min(1.0, *(kept.value for kept in self.kept.values()))

    @property
    def quality_low(self) -> float:
        """The lowest of the tasks' lower bounds."""
        return min(kept.low for kept in self.kept.values())


@dataclasses.dataclass(frozen=True)
class Target:
    """What is asked for.

    Attributes:
        kind: `ttft`, seconds; `ttft_ratio`, share of the unpruned time; `memory`, bytes; `quality`, share kept.
        limit: the least that must be kept of quality, the most of the others.
    """

    kind: Kind
    limit: float

    def bound(self, setting: Setting) -> float:
        """The number of the setting that the limit is held against."""
        return {
            "ttft": setting.cost.ttft_q75,
            "ttft_ratio": setting.cost.ttft_ratio_q75,
            "memory": setting.cost.peak_memory_bytes,
            "quality": setting.quality_low,
        }[self.kind]

    def miss(self, setting: Setting) -> float:
        """By how much the setting misses the limit; 0 or less where it meets it."""
        over = self.bound(setting) - self.limit
        return -over if self.kind == "quality" else over


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The answer.

    Attributes:
        chosen: the setting that meets the target at the least loss of the other side; None where none does.
        closest: the chosen one, or else the one that misses by least.
        miss: by how much; 0 or less for one that keeps enough quality and is no faster than unpruned.
    """

    chosen: Setting | None
    closest: Setting
    miss: float


def cost_at(costs: Sequence[Cost], prompt_tokens: int) -> Cost:
    """The cost of one setting at a prompt length, measured or between two measured ones.

    Between them a time, or a ratio of times, is taken for a power of the length, and bytes for linear in it. A time is
    a sum of such powers, which bends upwards between logarithms: the true one is rather less than this.

    Args:
        costs: of one setting, a length each, in any order.
        prompt_tokens: the length.

    Raises:
        ValueError: the length lies outside the measured ones, from which nothing follows.
    """
    by_length = {cost.prompt_tokens: cost for cost in costs}
    if prompt_tokens in by_length:
        return by_length[prompt_tokens]
    shorter = [length for length in by_length if length < prompt_tokens]
    longer = [length for length in by_length if length > prompt_tokens]
    if not shorter or not longer:
        raise ValueError(
            f"{prompt_tokens} prompt tokens: measured are {min(by_length)} to {max(by_length)}, and only what lies "
            "between can be told"
        )
    low, high = by_length[max(shorter)], by_length[min(longer)]
    linear = (prompt_tokens - low.prompt_tokens) / (high.prompt_tokens - low.prompt_tokens)
    logarithmic = math.log(prompt_tokens / low.prompt_tokens) / math.log(high.prompt_tokens / low.prompt_tokens)

    def power(a: float, b: float) -> float:
        return a * (b / a) ** logarithmic

    return Cost(
        prompt_tokens=prompt_tokens,
        ttft_s=power(low.ttft_s, high.ttft_s),
        ttft_q25=power(low.ttft_q25, high.ttft_q25),
        ttft_q75=power(low.ttft_q75, high.ttft_q75),
        ttft_ratio=power(low.ttft_ratio, high.ttft_ratio),
        ttft_ratio_q75=power(low.ttft_ratio_q75, high.ttft_ratio_q75),
        peak_memory_bytes=low.peak_memory_bytes + linear * (high.peak_memory_bytes - low.peak_memory_bytes),
        kv_cache_bytes=low.kv_cache_bytes + linear * (high.kv_cache_bytes - low.kv_cache_bytes),
        repeats=min(low.repeats, high.repeats),
        between=(low.prompt_tokens, high.prompt_tokens),
    )


def kept_loss(pruned: Sequence[float], unpruned: Sequence[float]) -> Kept:
    """What is kept by mean losses in nats: the interval is that of the paired difference, as in comparisons.csv.

    Args:
        pruned, unpruned: one loss per example, the same examples in the same order.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    differences = [a - b for a, b in zip(pruned, unpruned, strict=True)]
    low, high = mean_interval(differences)
    value = retained_loss(math.fsum(differences) / len(differences), 0.0)
    if math.isnan(low):  # one example
        return Kept(value, 0.0, math.inf, len(differences))
    return Kept(value, retained_loss(high, 0.0), retained_loss(low, 0.0), len(differences))


def kept_share(pruned: Sequence[float], unpruned: Sequence[float]) -> Kept:
    """What is kept by shares of right answers: the interval of a ratio of paired means (Fieller 1954).

    For the interval two examples are added, one that only pruning gets right and one that only it gets wrong, as Bonett
    and Price (2012) do for paired differences: that a few examples agree does not mean that all would.

    Args:
        pruned, unpruned: a number in [0, 1] per example, the same examples in the same order.

    Raises:
        ValueError: the lists differ in length or are empty, or unpruned got none right, of which no share can be kept.
    """
    if len(pruned) != len(unpruned) or not any(unpruned):
        raise ValueError(
            f"{len(pruned)} pruned and {len(unpruned)} unpruned answers, {math.fsum(unpruned):g} of these right: "
            "as many are needed, and a right one"
        )
    value = retained_share(math.fsum(pruned), math.fsum(unpruned))
    pairs = np.array([[*pruned, 1.0, 0.0], [*unpruned, 0.0, 1.0]], dtype=np.float64)
    above, below = pairs.mean(axis=1).tolist()
    squared = float(stats.norm.ppf(0.5 + LEVEL / 2)) ** 2
    (of_above, shared), (_, of_below) = (np.cov(pairs) * squared / pairs.shape[1]).tolist()
    # The ratios r for which the mean of pruned - r * unpruned is not told from 0: a r² - 2 b r + c <= 0.
    a, b, c = below**2 - of_below, above * below - shared, above**2 - of_above
    root = math.sqrt(max(0.0, b * b - a * c))
    if a <= 0:  # unpruned itself is not told from 0
        return Kept(value, 0.0, math.inf, len(pruned))
    return Kept(value, max(0.0, min(value, (b - root) / a)), max(value, (b + root) / a), len(pruned))


def recommend(settings: Sequence[Setting], target: Target) -> Recommendation:
    """Choose among settings measured at one prompt length.

    For time and memory: of those that meet the target, unpruned among them, the one that keeps most quality (`quality`,
    then its lower bound), then the one further from the limit. For quality: the fastest of those that meet it and are
    faster than unpruned, then the one that keeps more. Equal in all of that, the larger keep ratio.

    Args:
        settings: unpruned, and at least one that prunes.
        target: what is asked for.

    Raises:
        ValueError: there is no unpruned setting, or nothing else.
    """
    pruned = sorted((one for one in settings if one.method != UNPRUNED), key=lambda one: -one.keep_ratio)
    unpruned = [one for one in settings if one.method == UNPRUNED]
    if len(unpruned) != 1 or not pruned:
        raise ValueError(f"{len(unpruned)} unpruned and {len(pruned)} pruned settings: 1 and at least 1 are needed")
    if target.kind == "quality":
        faster = [one for one in pruned if one.cost.ttft_s < unpruned[0].cost.ttft_s]
        meeting = [one for one in faster if target.miss(one) <= 0]
        if meeting:
            chosen = min(meeting, key=lambda one: (one.cost.ttft_s, -one.quality_low))
            return Recommendation(chosen, chosen, target.miss(chosen))
        closest = min(pruned, key=lambda one: (target.miss(one), one.cost.ttft_s))
        return Recommendation(None, closest, target.miss(closest))
    meeting = [one for one in [*unpruned, *pruned] if target.miss(one) <= 0]
    if meeting:
        chosen = max(meeting, key=lambda one: (one.quality, one.quality_low, -target.bound(one)))
        return Recommendation(chosen, chosen, target.miss(chosen))
    closest = min([*unpruned, *pruned], key=lambda one: (target.miss(one), -one.quality))
    return Recommendation(None, closest, target.miss(closest))
