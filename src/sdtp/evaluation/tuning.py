"""Where to prune: the token counts of the stages that do the least damage at a given cost.

The model of damage is additive. `D_s(f)` is what pruning at stage s alone to the fraction f of the prompt does,
measured at a few fractions. A schedule that leaves `f_1 >= f_2 >= ...` is taken to do `sum_s D_s(f_s) - D_s(f_(s-1))`,
with `f_0 = 1`: a stage is charged for the tokens that it removes, at the rate at which removing them there hurts. Later
stages hurt less and save less; which of the two counts for more is what is solved for. A stage that leaves what the one
before left removes nothing, so that choosing fractions chooses layers as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sdtp.evaluation.costs import Costs
from sdtp.pruning.schedule import PruningSchedule

# Most token counts that a stage chooses from, and units that a budget is divided into. Costs are rounded up to units,
# one a stage, so that the chosen counts cost at most the budget and less than a unit a stage below it.
LEVELS, UNITS = 64, 4000
# What a move changes one stage's count by.
MOVE = 0.75


@dataclasses.dataclass(frozen=True)
class Plan:
    """A schedule that was solved for.

    Attributes:
        counts: tokens left after each stage, never ascending.
        damage: what the additive model predicts.
    """

    counts: tuple[int, ...]
    damage: float


class UnreachableError(ValueError):
    """No schedule is as cheap as was asked.

    Attributes:
        least: the least cost there is, as a share of the unpruned one's.
    """

    def __init__(self, ratio: float, least: float) -> None:
        super().__init__(f"a cost ratio of {ratio:g} is out of reach: the least is {least:.4f}")
        self.least = least


class Tuner:
    """Solves for the counts of least damage at a cost, and for what lies around them.

    Args:
        schedule: whose layers are kept and whose protected tokens stay; its own fractions do not matter.
        costs: of `schedule`'s stages, for the prompt length that counts are chosen for.
        curves: a damage curve for each stage.
        ratio: most that a plan may cost, as a share of the unpruned prefill's.
        levels, units: see `LEVELS` and `UNITS`.

    Raises:
        UnreachableError: protected tokens, and what runs before the first stage, cost more than that.
        ValueError: another number of curves than stages, or no stages.
    """

    def __init__(
        self,
        schedule: PruningSchedule,
        costs: Costs,
        curves: Sequence[Callable[[float], float]],
        ratio: float,
        levels: int = LEVELS,
        units: int = UNITS,
    ) -> None:
        if not schedule.stages or len(curves) != schedule.stages:
            raise ValueError(f"{len(curves)} damage curves for {schedule.stages} stages: one each is needed")
        self.costs, self.ratio, self._curves, self._units = costs, ratio, curves, units
        self._total = costs.of([costs.prompt_tokens] * schedule.stages)
        self.counts = level_counts(schedule, costs.prompt_tokens, levels)
        entering = self.counts[:, None]
        floors = np.array([floor(schedule, int(n)) for n in self.counts])
        # A stage may leave what entered it, or fewer tokens but never fewer than are protected among those.
        self._allowed = (self.counts < entering) & (self.counts >= floors[:, None]) | np.eye(
            len(self.counts), dtype=bool
        )
        stages = range(schedule.stages)
        layers = np.array([[costs.stage(s, int(n)) for n in self.counts] for s in stages])  # [stages, levels]
        scored = np.array([costs.scoring(int(n)) for n in self.counts])
        self._cost = layers[:, None, :] + np.where(self.counts < entering, scored[:, None], 0.0)  # [stages, from, to]
        damage = np.array([[curve(float(n) / costs.prompt_tokens) for n in self.counts] for curve in curves])
        self._damage = np.where(self._allowed, damage[:, None, :] - damage[:, :, None], np.inf)  # [stages, from, to]
        least = self.least()
        if least > ratio:
            raise UnreachableError(ratio, least)

    def least(self) -> float:
        """The least cost of any counts, as a share of the unpruned prefill's."""
        cheapest = np.full(len(self.counts), np.inf)
        cheapest[0] = self.costs.fixed
        for cost in self._cost:
            cheapest = np.min(np.where(self._allowed, cheapest[:, None] + cost, np.inf), axis=0)
        return float(cheapest.min() / self._total)

    def predict(self, counts: Sequence[int]) -> float:
        """Damage of any counts by the additive model."""
        entering = [self.costs.prompt_tokens, *counts[:-1]]
        terms = zip(self._curves, entering, counts, strict=True)
        tokens = self.costs.prompt_tokens
        return sum(curve(left / tokens) - curve(n / tokens) for curve, n, left in terms)

    def solve(self, pinned: Mapping[int, int] | None = None) -> Plan | None:
        """The plan of least predicted damage at the cost, exactly, up to the rounding of costs to units.

        Args:
            pinned: stage -> index into `counts` of what it must leave.

        Returns:
            None where no plan with what is pinned is cheap enough.
        """
        budget = self.ratio * self._total - self.costs.fixed
        # A hair off, so that what is a whole number of units stays one under rounding.
        weights = np.ceil(self._cost / budget * self._units - 1e-9).astype(np.int64)
        size = len(self.counts)
        # best[level, units]: least damage of the stages so far that leave `counts[level]` for exactly so many units.
        best = np.full((size, self._units + 1), np.inf)
        best[0, 0] = 0.0
        origins = []
        for stage, (weight, damage) in enumerate(zip(weights, self._damage, strict=True)):
            after = np.full_like(best, np.inf)
            origin = np.zeros(best.shape, dtype=np.int16)
            for left in range(size) if pinned is None or stage not in pinned else (pinned[stage],):
                for entered in np.flatnonzero(self._allowed[:, left]):
                    used = weight[entered, left]
                    if used > self._units:
                        continue
                    reached = best[entered, : self._units + 1 - used] + damage[entered, left]
                    better = reached < after[left, used:]
                    after[left, used:][better] = reached[better]
                    origin[left, used:][better] = entered
            best = after
            origins.append((origin, weight))
        level, units = np.unravel_index(np.argmin(best), best.shape)
        if not np.isfinite(best[level, units]):
            return None
        least = float(best[level, units])
        path = []
        for origin, weight in reversed(origins):
            path.append(int(self.counts[level]))
            entered = origin[level, units]
            level, units = entered, units - weight[entered, level]
        return Plan(tuple(reversed(path)), least)

    def moves(self, plan: Plan, most: int) -> list[Plan]:
        """Plans around one: a stage leaves about `MOVE` as many tokens, or as many more, and the others make up for it.

        What the curves do not know, that removals at several stages add to more or less than their sum, decides between
        neighbours of about equal predicted damage.

        Args:
            plan: of `solve`.
            most: plans to give.

        Returns:
            Those of least predicted damage first, each different from `plan` and from the others.
        """
        found: dict[tuple[int, ...], Plan] = {}
        for stage, count in enumerate(plan.counts):
            for wanted in (count * MOVE, count / MOVE):
                level = int(np.argmin(np.abs(self.counts - wanted)))
                moved = None if self.counts[level] == count else self.solve({stage: level})
                if moved is not None:
                    found[moved.counts] = moved
        return sorted(found.values(), key=lambda moved: moved.damage)[:most]


def floor(schedule: PruningSchedule, present: int) -> int:
    """Fewest tokens that a stage may leave of `present`."""
    return max(1, min(present, schedule.sinks + schedule.protected_tail(present)))


def level_counts(schedule: PruningSchedule, prompt_tokens: int, levels: int) -> np.ndarray:
    """Token counts to choose from: descending from the whole prompt to the fewest that any number of stages can leave.

    Args:
        schedule: says how many stages there are, and what is protected at each.
        prompt_tokens: `N`.
        levels: about how many counts, evenly spaced on a logarithmic scale; those that each stage can leave at the
            least are among them.

    Raises:
        ValueError: `levels` is below 2.
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}: at least 2 are needed")
    least = [prompt_tokens]
    for _ in range(schedule.stages):
        least.append(floor(schedule, least[-1]))
    spaced = np.geomspace(prompt_tokens, least[-1], levels).round().astype(int)
    return np.unique(np.concatenate([spaced, least]))[::-1]


def schedule_of(schedule: PruningSchedule, counts: Sequence[int], prompt_tokens: int) -> PruningSchedule:
    """`schedule`'s layers and protection with the fractions that leave `counts` of a prompt of `prompt_tokens`."""
    return dataclasses.replace(schedule, keep=tuple(count / prompt_tokens for count in counts), budget=None)


def alone(schedule: PruningSchedule, stage: int, fraction: float, prompt_tokens: int) -> PruningSchedule:
    """A schedule that prunes at one stage of `schedule`'s and nowhere else.

    Where more than the fraction is protected it leaves what is, at that stage; later ones would else remove what is
    protected in the whole prompt and no more in what is left of it.
    """
    count = max(round(fraction * prompt_tokens), floor(schedule, prompt_tokens))
    return schedule_of(schedule, [prompt_tokens] * stage + [count] * (schedule.stages - stage), prompt_tokens)


def geometric(schedule: PruningSchedule, costs: Costs, ratio: float) -> PruningSchedule:
    """The geometric schedule over `schedule`'s layers that keeps the most at a cost of at most `ratio`.

    Raises:
        UnreachableError: protected tokens, and what runs before the first stage, cost more than that.
    """
    return _dearest(schedule.with_ratio, costs, ratio)


def blend(plan: PruningSchedule, share: float, costs: Costs, ratio: float) -> PruningSchedule:
    """Between the geometric schedule (`share` 0) and `plan` (1), at a cost of at most `ratio`.

    A stage's logarithm of its fraction is `share` times the plan's, the rest a geometric schedule's. The additive model
    is measured on stages that prune alone, and knows nothing of a later stage's looking again at what an earlier one
    left to it, from which schedules that prune gradually may gain.

    Raises:
        UnreachableError: see `geometric`.
    """

    def blended(keep: float) -> PruningSchedule:
        gradual = plan.with_ratio(keep).keep
        fractions = (a**share * b ** (1 - share) for a, b in zip(plan.keep, gradual, strict=True))
        return dataclasses.replace(plan, keep=tuple(fractions))

    return _dearest(blended, costs, ratio)


def _dearest(family: Callable[[float], PruningSchedule], costs: Costs, ratio: float) -> PruningSchedule:
    """Of schedules by a number in (0, 1] that keep the more the greater it is, the last that costs `ratio` at most."""

    def cost(number: float) -> float:
        return costs.ratio(family(number).surviving(costs.prompt_tokens))

    # The last stage's share of the prompt is the product over the stages, and must stay above the smallest number.
    low, high = max(1e-6, 1e-300 ** (1 / len(family(1.0).keep))), 1.0
    if cost(low) > ratio:
        raise UnreachableError(ratio, cost(low))
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= ratio else (low, middle)
    return family(low)
