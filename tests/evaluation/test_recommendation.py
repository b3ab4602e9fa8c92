"""What is kept and with which interval, costs between measured lengths, and choices worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdtp.evaluation.recommendation import (
    UNPRUNED,
    Cost,
    Kept,
    Recommendation,
    Setting,
    Target,
    cost_at,
    kept_loss,
    kept_share,
    recommend,
)
from sdtp.evaluation.stats import mean_interval


class TestKeptShare:
    def test_by_hand(self) -> None:
        # With the two added: means 4/6 and 5/6, variances .26667 and .16667, covariance -.06667, each over 6 examples.
        kept = kept_share([1, 1, 1, 0], [1, 1, 1, 1])
        assert (kept.value, kept.n) == (0.75, 4)
        assert (kept.low, kept.high) == pytest.approx((0.26265, 1.77308), abs=2e-5)

    def test_few_examples_that_agree_prove_little(self) -> None:
        few, many = (kept_share([1.0] * n + [0.0], [1.0] * n + [0.0]) for n in (11, 400))
        assert few.value == many.value == 1.0
        assert 0.7 < few.low < 0.8
        assert 0.98 < many.low < 1.0

    @pytest.mark.parametrize(("n", "wrong", "gained"), [(12, 0.02, 0.01), (28, 0.1, 0.02), (200, 0.1, 0.02)])
    def test_lower_bound_covers(self, n: int, wrong: float, gained: float) -> None:
        """Unpruned is right with probability 0.83; pruning loses some of that and gains some. Nominal: 0.975."""
        rng, truth, covered = np.random.default_rng(0), (0.83 - wrong + gained) / 0.83, 0
        for _ in range(300):
            draw = rng.random(n)
            pruned = (draw >= wrong) & (draw < 0.83 + gained)
            covered += kept_share(pruned.tolist(), (draw < 0.83).tolist()).low <= truth
        assert covered >= 0.95 * 300

    def test_interval_narrows_where_examples_are_paired(self) -> None:
        right = [1.0, 0.0] * 50
        paired, crossed = kept_share(right, right), kept_share(right[::-1], right)
        assert paired.value == crossed.value == 1.0
        assert paired.low > 0.93
        assert crossed.low < 0.75

    def test_shares_of_seeds(self) -> None:
        kept = kept_share([0.5, 1.0, 0.5, 0.0] * 10, [1.0, 1.0, 0.5, 0.5] * 10)
        assert kept.value == pytest.approx(2 / 3)
        assert 0.5 < kept.low < 2 / 3 < kept.high < 0.85

    def test_unpruned_that_is_not_told_from_0_bounds_nothing(self) -> None:
        kept = kept_share([1, 0, 0, 0], [1, 0, 0, 0])
        assert (kept.low, kept.high) == (0.0, math.inf)

    def test_a_share_is_never_below_0(self) -> None:
        assert kept_share([0.0] * 30, [1.0] * 30).low == 0.0

    @pytest.mark.parametrize(("pruned", "unpruned"), [([1], [1, 1]), ([1, 1], [0, 0]), ([], [])])
    def test_refused(self, pruned: list[float], unpruned: list[float]) -> None:
        with pytest.raises(ValueError, match="as many are needed, and a right one"):
            kept_share(pruned, unpruned)


class TestKeptLoss:
    def test_interval_is_that_of_the_paired_difference(self) -> None:
        unpruned = [2.0, 9.0, 5.0, 1.0, 7.0, 3.0]
        pruned = [2.1, 9.3, 5.1, 1.2, 7.0, 3.2]
        low, high = mean_interval([a - b for a, b in zip(pruned, unpruned, strict=True)])
        kept = kept_loss(pruned, unpruned)
        assert kept.value == pytest.approx(math.exp(-0.15))
        assert (kept.low, kept.high) == pytest.approx((math.exp(-high), math.exp(-low)))
        assert 0.7 < kept.low < kept.value < kept.high < 1.0  # unpaired, the losses' own spread would drown it
        assert kept.n == 6

    def test_one_example_bounds_nothing(self) -> None:
        assert kept_loss([1.0], [1.0]) == Kept(1.0, 0.0, math.inf, 1)

    def test_the_same_examples_are_needed(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            kept_loss([1.0, 2.0], [1.0])


def cost(
    tokens: int = 1000, seconds: float = 1.0, ratio: float = 0.5, peak: float = 100.0, cache: float = 10.0
) -> Cost:
    return Cost(tokens, seconds, 0.75 * seconds, 1.25 * seconds, ratio, 1.25 * ratio, peak, cache, 5)


class TestCostAt:
    COSTS = (cost(4000, 8.0, 0.4, 400.0, 40.0), cost(1000, 1.0, 0.5, 100.0, 10.0))

    def test_measured_length(self) -> None:
        assert cost_at(self.COSTS, 4000) is self.COSTS[0]

    def test_between_two(self) -> None:
        # 2000 is halfway between 1000 and 4000 in logarithms, and a third of the way on a line.
        between = cost_at(self.COSTS, 2000)
        assert between.ttft_s == pytest.approx(math.sqrt(8))
        assert (between.ttft_q25, between.ttft_q75) == pytest.approx((0.75 * math.sqrt(8), 1.25 * math.sqrt(8)))
        assert (between.ttft_ratio, between.ttft_ratio_q75) == pytest.approx((math.sqrt(0.2), 1.25 * math.sqrt(0.2)))
        assert (between.peak_memory_bytes, between.kv_cache_bytes) == pytest.approx((200.0, 20.0))
        assert (between.prompt_tokens, between.between) == (2000, (1000, 4000))

    def test_the_nearest_two_count(self) -> None:
        costs = [*self.COSTS, cost(1500, 100.0), cost(3000, 100.0)]
        assert cost_at(costs, 2000).ttft_s == pytest.approx(100.0)
        assert cost_at(costs, 2000).between == (1500, 3000)

    def test_it_is_no_less_than_a_sum_of_powers(self) -> None:
        def seconds(n: int) -> float:
            return 0.1 + n / 600 + n * n / 4e6

        found = cost_at([cost(n, seconds(n)) for n in (512, 4096)], 1500)
        assert seconds(1500) < found.ttft_s < 1.3 * seconds(1500)

    @pytest.mark.parametrize("tokens", [999, 4001])
    def test_nothing_beyond(self, tokens: int) -> None:
        with pytest.raises(ValueError, match=f"{tokens} prompt tokens: measured are 1000 to 4000"):
            cost_at(self.COSTS, tokens)


def setting(
    keep_ratio: float, seconds: float, peak: float, *kept: tuple[float, float], method: str = "sdtp"
) -> Setting:
    """`kept`: value and lower bound of a task each. Of a time the upper quartile is 1.25 of it; unpruned takes 10 s."""
    tasks = {f"task{index}": Kept(value, low, 2.0, 200) for index, (value, low) in enumerate(kept)}
    return Setting(method, keep_ratio, cost(seconds=seconds, ratio=seconds / 10, peak=peak), tasks)


FULL = setting(1.0, 10.0, 100.0, (1.0, 1.0), (1.0, 1.0), method=UNPRUNED)
LIGHT = setting(0.9, 6.0, 80.0, (0.99, 0.95), (0.97, 0.96))
MIDDLE = setting(0.8, 4.0, 60.0, (0.98, 0.90), (0.90, 0.88))
HARD = setting(0.7, 3.0, 70.0, (0.60, 0.50), (0.85, 0.83))  # its peak was measured above MIDDLE's
ALL = (HARD, FULL, LIGHT, MIDDLE)


@pytest.mark.parametrize(
    ("target", "chosen", "miss"),
    [
        (Target("ttft", 12.5), FULL, 0.0),
        (Target("ttft", 12.0), LIGHT, -4.5),  # unpruned takes 10 s, but its upper quartile is 12.5
        (Target("ttft", 7.5), LIGHT, 0.0),
        (Target("ttft", 7.25), MIDDLE, -2.25),
        (Target("ttft", 4.0), HARD, -0.25),
        (Target("ttft_ratio", 0.75), LIGHT, 0.0),
        (Target("ttft_ratio", 0.625), MIDDLE, -0.125),  # LIGHT's median is 0.6, its upper quartile 0.75
        (Target("memory", 100.0), FULL, 0.0),
        (Target("memory", 75.0), MIDDLE, -15.0),  # HARD meets it as well and keeps less
        (Target("memory", 60.0), MIDDLE, 0.0),
        (Target("quality", 0.95), LIGHT, 0.0),
        (Target("quality", 0.88), MIDDLE, 0.0),
        (Target("quality", 0.5), HARD, 0.0),
    ],
)
def test_chosen(target: Target, chosen: Setting, miss: float) -> None:
    answer = recommend(ALL, target)
    assert answer.chosen is answer.closest is chosen
    assert answer.miss == pytest.approx(miss, abs=1e-9)


@pytest.mark.parametrize(
    ("target", "closest", "miss"),
    [
        (Target("ttft", 3.0), HARD, 0.75),
        (Target("ttft_ratio", 0.3), HARD, 0.075),
        (Target("memory", 50.0), MIDDLE, 10.0),
        (Target("quality", 0.96), LIGHT, 0.01),  # the worse of its tasks decides; unpruned is no answer
    ],
)
def test_nothing_meets_it(target: Target, closest: Setting, miss: float) -> None:
    answer = recommend(ALL, target)
    assert (answer.chosen, answer.closest) == (None, closest)
    assert answer.miss == pytest.approx(miss)


def chosen(target: Target, *settings: Setting) -> Setting | None:
    forwards, backwards = recommend([FULL, *settings], target), recommend([*settings[::-1], FULL], target)
    assert forwards == backwards  # the order they come in decides nothing
    return forwards.chosen


class TestTies:
    def test_more_than_unpruned_is_no_better_than_unpruned(self) -> None:
        lucky = setting(0.9, 6.0, 80.0, (1.05, 0.97))
        assert chosen(Target("ttft", 20.0), lucky) is FULL
        surer = setting(0.8, 5.0, 80.0, (1.01, 0.98))
        assert chosen(Target("ttft", 8.0), lucky, surer) is surer

    def test_the_better_proven_quality(self) -> None:
        vague, sure = setting(0.9, 3.0, 80.0, (0.9, 0.5)), setting(0.8, 4.0, 80.0, (0.9, 0.8))
        assert chosen(Target("ttft", 5.0), vague, sure) is sure

    def test_then_the_faster_or_smaller(self) -> None:
        slow, fast = setting(0.9, 4.0, 70.0, (0.9, 0.8)), setting(0.8, 3.0, 80.0, (0.9, 0.8))
        assert chosen(Target("ttft", 5.0), slow, fast) is fast
        assert chosen(Target("memory", 90.0), slow, fast) is slow

    def test_then_the_larger_keep_ratio(self) -> None:
        more, less = setting(0.9, 4.0, 70.0, (0.9, 0.8)), setting(0.8, 4.0, 70.0, (0.9, 0.8))
        for target in (Target("ttft", 5.0), Target("memory", 90.0), Target("quality", 0.7)):
            assert chosen(target, more, less) is more

    def test_as_fast_the_one_that_keeps_more(self) -> None:
        worse, better = setting(0.9, 4.0, 70.0, (0.9, 0.75)), setting(0.8, 4.0, 70.0, (0.9, 0.8))
        assert chosen(Target("quality", 0.7), worse, better) is better


def test_what_is_no_faster_than_unpruned_gains_nothing() -> None:
    slow = setting(0.9, 10.0, 80.0, (1.0, 0.99))
    assert recommend([FULL, slow], Target("quality", 0.9)) == Recommendation(None, slow, pytest.approx(-0.09))


@pytest.mark.parametrize("settings", [[FULL], [LIGHT], [FULL, FULL, LIGHT]])
def test_unpruned_and_something_else_are_needed(settings: list[Setting]) -> None:
    with pytest.raises(ValueError, match="1 and at least 1 are needed"):
        recommend(settings, Target("ttft", 1.0))
