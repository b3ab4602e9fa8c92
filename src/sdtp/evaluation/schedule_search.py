"""The search for a schedule: measure stages alone, solve, measure what was solved for, judge it on other examples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.evaluation.costs import Costs
from sdtp.evaluation.damage import Damage, DamageCurve, Measurements, damages, task_weights
from sdtp.evaluation.stats import PairedDifference, mean_interval, paired_difference, shown
from sdtp.evaluation.tuning import Tuner, alone, blend, schedule_of
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

# Shares of the prompt at which each stage is measured alone, about evenly spaced in their logarithms.
FRACTIONS = (0.85, 0.7, 0.5, 0.35, 0.2, 0.12)
# Shares of the way from the geometric schedule to the solved one, and neighbours of that, which are measured as well.
BLENDS, MOVES = (1 / 3, 2 / 3), 4


@dataclasses.dataclass(frozen=True)
class Measured:
    """Schedules on examples.

    Attributes:
        rows: [examples][schedules].
        tasks: of the examples; in means every task counts alike.
    """

    rows: list[list[Damage]]
    tasks: list[str]

    def weighted(self, index: int, field: str) -> list[float]:
        """A field of one schedule, a number an example; its plain mean gives every task the same weight."""
        weights = task_weights(self.tasks)
        return [weight * float(getattr(row[index], field)) for row, weight in zip(self.rows, weights, strict=True)]

    def kl(self, index: int) -> float:
        """Mean KL of one schedule."""
        return float(np.mean(self.weighted(index, "kl")))

    def summary(self, index: int) -> dict[str, Any]:
        """Means of one schedule, over all tasks and in each, and the 95% interval of its KL."""
        fields = [field.name for field in dataclasses.fields(Damage)]
        means: dict[str, Any] = {field: float(np.mean(self.weighted(index, field))) for field in fields}
        means["kl_interval"] = mean_interval(self.weighted(index, "kl"))
        means["tasks"] = {}
        for task in sorted(set(self.tasks)):
            own = [row[index] for row, of in zip(self.rows, self.tasks, strict=True) if of == task]
            cell = {field: float(np.mean([getattr(one, field) for one in own])) for field in fields}
            means["tasks"][task] = {**cell, "n": len(own)}
        return means


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        stages: each stage alone: layer, and a summary for each of `FRACTIONS`.
        candidates: whole schedules by name on the choosing examples: cost, prediction, summary.
        best: name of the candidate of least mean KL there.
        compared: `geometric`, and `tuned` where another candidate is best.
        report: summaries of those on the reporting examples.
        difference: tuned minus geometric on the reporting examples, `kl` and `loss`; None without `tuned`.
    """

    stages: list[dict[str, Any]]
    candidates: dict[str, dict[str, Any]]
    best: str
    compared: dict[str, PruningSchedule]
    report: dict[str, dict[str, Any]]
    difference: dict[str, PairedDifference] | None

    @property
    def chosen(self) -> str:
        """`tuned` where its KL is shown to be lower, else `geometric`.

        See `stats.shown`, whose test finds nothing in fewer than `names.LEAST_REPORTED`.
        """
        if self.difference is None:
            return "geometric"
        kl = self.difference["kl"]
        return "tuned" if kl.high < 0.0 and shown(kl.low, kl.high, kl.p_value) else "geometric"


def search(
    model: PreTrainedModel,
    pruner: TokenPruner,
    costs: Costs,
    ratio: float,
    baseline: PruningSchedule,
    choosing: Sequence[dict[str, Any]],
    reporting: Sequence[dict[str, Any]],
    known: Measurements | None = None,
) -> Found:
    """Find the fractions of `pruner`'s stages that do the least damage at a cost, and compare with geometric ones.

    Args:
        model: eval mode, unhooked.
        pruner: whose layers, protection and scorer are kept.
        costs: of its stages.
        ratio: most that a schedule may cost, as a share of the unpruned model's.
        baseline: the geometric schedule of that cost, which another has to beat.
        choosing: rows `prompt_ids`, `response_ids`, `task`, on which everything is measured that decides.
        reporting: others, on which what was chosen is compared with the geometric schedule.
        known: gets each measurement as it is made, and spares those it has.

    Raises:
        UnreachableError: no schedule is so cheap.
    """
    schedule, tokens = pruner.schedule, costs.prompt_tokens
    cells = list(itertools.product(range(schedule.stages), FRACTIONS))
    # What fewer candidates save is taken off when they are known.
    most = 2 + len(BLENDS) + MOVES
    forwards = len(choosing) * (1 + len(cells) + 1 + most) + len(reporting) * 3
    with tqdm(total=forwards, desc="damage of each stage", unit="forward") as progress:

        def measure(
            examples: Sequence[dict[str, Any]], schedules: Callable[[int], Sequence[PruningSchedule]]
        ) -> Measured:
            rows = damages(model, pruner, examples, schedules, progress.update, known)
            return Measured(rows, [str(example["task"]) for example in examples])

        single = measure(choosing, lambda n: [alone(schedule, stage, fraction, n) for stage, fraction in cells])
        stages = _stages(single, cells, schedule)
        tuner = Tuner(schedule, costs, [_curve(stage) for stage in stages], ratio)
        candidates = _candidates(tuner, schedule, baseline)
        progress.set_description("whole schedules")
        _shorten(progress, len(choosing) * (most - len(candidates)))
        whole = measure(choosing, lambda n: list(candidates.values()))
        best = min(enumerate(candidates), key=lambda named: whole.kl(named[0]))[1]
        compared = {"geometric": baseline}
        if best != "geometric":
            compared["tuned"] = candidates[best]
        progress.set_description("on other examples")
        _shorten(progress, len(reporting) * (2 - len(compared)))
        judged = measure(reporting, lambda n: list(compared.values()))
    difference = None
    if "tuned" in compared:
        difference = {
            field: paired_difference(judged.weighted(1, field), judged.weighted(0, field)) for field in ("kl", "loss")
        }
    described = {}
    for index, (name, candidate) in enumerate(candidates.items()):
        left = candidate.surviving(tokens)
        predicted = {"cost": costs.ratio(left), "predicted_kl": tuner.predict(left)}
        described[name] = {"keep": candidate.keep, "survivors": left, **predicted, **whole.summary(index)}
    report = {name: judged.summary(index) for index, name in enumerate(compared)}
    return Found(stages, described, best, compared, report, difference)


def _shorten(progress: Any, forwards: int) -> None:
    progress.total -= forwards
    progress.refresh()


def _stages(single: Measured, cells: Sequence[tuple[int, float]], schedule: PruningSchedule) -> list[dict[str, Any]]:
    """What each stage does alone, by the fraction asked of it."""
    stages: list[dict[str, Any]] = [{"layer": layer, "points": []} for layer in schedule.layers]
    for index, (stage, fraction) in enumerate(cells):
        stages[stage]["points"].append({"fraction": fraction, **single.summary(index)})
    return stages


def _curve(stage: dict[str, Any]) -> DamageCurve:
    """By the share that was really left: protected tokens may be more than the fraction asked for."""
    removing = [point for point in stage["points"] if point["kept_share"] < 1.0]
    return DamageCurve([point["kept_share"] for point in removing], [point["kl"] for point in removing])


def _candidates(tuner: Tuner, schedule: PruningSchedule, baseline: PruningSchedule) -> dict[str, PruningSchedule]:
    """Schedules of about equal cost by name, the geometric one first; none twice."""
    tokens = tuner.costs.prompt_tokens
    plan = tuner.solve()
    if plan is None:  # within rounding of the least cost, where the geometric schedule is about all there is
        return {"geometric": baseline}
    optimum = schedule_of(schedule, plan.counts, tokens)
    named = {"geometric": baseline, "optimum": optimum}
    for share in BLENDS:
        named[f"blend {share:.2f}"] = blend(optimum, share, tuner.costs, tuner.ratio)
    for number, moved in enumerate(tuner.moves(plan, MOVES), 1):
        named[f"move {number}"] = schedule_of(schedule, moved.counts, tokens)
    first: dict[tuple[int, ...], str] = {}
    for name, candidate in named.items():
        first.setdefault(tuple(candidate.surviving(tokens)), name)
    return {name: named[name] for name in first.values()}
