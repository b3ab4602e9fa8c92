"""What pruning does to a model's predictions of known responses: divergence from the unpruned model's."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from sdtp.evaluation.agreement import check_finite, divergence
from sdtp.evaluation.teacher_forcing import forced_logits
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.training.response import response_cross_entropy


@dataclasses.dataclass(frozen=True)
class Damage:
    """Of one schedule on one example.

    Attributes:
        kl: as `Agreement.kl`, KL(unpruned || pruned) in nats a response token. Far less noisy than the loss, which
            one token decides where this sums over the vocabulary.
        loss: mean negative log-likelihood of the response's tokens minus the unpruned model's, nats a token.
        kept_share: share of the prompt's tokens that the last layer holds.
    """

    kl: float
    loss: float
    kept_share: float


class Measurements(Protocol):
    """What was measured before, of one model and one scorer: what is in it is not measured again."""

    def get(self, example: Mapping[str, Any], schedule: PruningSchedule) -> Damage | None:
        """The damage of a schedule on an example, None where it is not known."""

    def add(self, example: Mapping[str, Any], schedule: PruningSchedule, damage: Damage) -> None:
        """Keep what was measured."""


def damages(
    model: PreTrainedModel,
    pruner: TokenPruner,
    examples: Sequence[dict[str, Any]],
    schedules: Callable[[int], Sequence[PruningSchedule]],
    forward: Callable[[], object] = lambda: None,
    known: Measurements | None = None,
) -> list[list[Damage]]:
    """Run every example unpruned and under each of several schedules.

    Args:
        model: eval mode, unhooked.
        pruner: whose scorer decides.
        examples: rows with `id`, `prompt_ids` and `response_ids`.
        schedules: prompt tokens -> the schedules for an example of that length, as many for each.
        forward: called after every forward, and for each that `known` spares.
        known: gets each measurement as it is made.

    Returns:
        [examples][schedules].
    """

    def of(example: dict[str, Any]) -> Iterator[Damage]:
        prompt, response = example["prompt_ids"], example["response_ids"]
        wanted = schedules(len(prompt))
        found = [None if known is None else known.get(example, schedule) for schedule in wanted]
        if None in found:
            unpruned, ids, _ = forced_logits(model, prompt, response)
            loss = response_cross_entropy(unpruned, ids).item()
            check_finite(f"the unpruned model on example {example['id']!r}", {"loss": loss})
        forward()
        for schedule, damage in zip(wanted, found, strict=True):
            if damage is None:
                logits, _, kept = forced_logits(model, prompt, response, pruner.with_schedule(schedule))
                more, kl = response_cross_entropy(logits, ids).item() - loss, divergence(logits, unpruned)
                left = list(schedule.surviving(len(prompt)))
                where = f"example {example['id']!r}, of whose {len(prompt)} tokens {left} are left"
                check_finite(where, {"loss": more, "kl": kl})
                damage = Damage(kl, more, kept / len(prompt))
                if known is not None:
                    known.add(example, schedule, damage)
            yield damage
            forward()

    # One example's distributions are held at a time: [response, vocabulary] of hundreds would be gigabytes.
    return [list(of(example)) for example in examples]


def task_weights(tasks: Sequence[str]) -> list[float]:
    """Weights of examples, 1 on average, with which every task counts as much as every other in their mean."""
    counts = Counter(tasks)
    return [len(tasks) / (len(counts) * counts[task]) for task in tasks]


class DamageCurve:
    """Damage of pruning at one stage alone, by the fraction of the prompt it leaves: 0 at 1, never falling towards 0.

    Between the measurements, after isotonic regression, a monotone cubic in the logarithm of the fraction, in which a
    geometric schedule takes equal steps. Below the lowest fraction a straight line in it, as steep as the last piece or
    as the whole curve, whichever is steeper: what was not measured is not taken to be free.

    Args:
        fractions: in (0, 1), of the prompt, as they were really left; in any order, equal ones are averaged.
        damage: one number each.

    Raises:
        ValueError: no fractions, or one outside (0, 1).
    """

    def __init__(self, fractions: Sequence[float], damage: Sequence[float]) -> None:
        if not len(fractions) or not all(0.0 < fraction < 1.0 for fraction in fractions):
            raise ValueError(f"fractions are {list(fractions)}: at least one is needed, each in (0, 1)")
        measured: dict[float, list[float]] = {}
        for fraction, value in zip(fractions, damage, strict=True):
            measured.setdefault(round(float(fraction), 9), []).append(value)
        removed = sorted(-math.log(fraction) for fraction in measured)  # 0 is nothing
        values = [measured[fraction] for fraction in sorted(measured, reverse=True)]
        fit = isotonic_regression([float(np.mean(group)) for group in values], weights=[len(group) for group in values])
        rising = np.maximum(fit.x, 0.0)
        x, y = np.array([0.0, *removed]), np.array([0.0, *rising])
        self._curve = PchipInterpolator(x, y)
        self._end = float(x[-1])
        self._last = float(y[-1])
        self._slope = float(max((y[-1] - y[-2]) / (x[-1] - x[-2]), y[-1] / x[-1]))

    def __call__(self, fraction: float) -> float:
        """Damage at a fraction in (0, 1]."""
        removed = -math.log(fraction)
        if removed > self._end:
            return self._last + self._slope * (removed - self._end)
        return float(self._curve(removed))
