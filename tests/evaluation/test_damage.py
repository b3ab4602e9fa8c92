"""Divergence from the unpruned model, and the curve through a stage's measurements."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.damage import DamageCurve, damages, task_weights
from sdtp.evaluation.teacher_forcing import force
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

PROMPT, RESPONSE = list(range(3, 43)), [9, 60, 33, 2]
SCHEDULE = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)
NOTHING = PruningSchedule((1, 3), (1.0, 1.0), sinks=2, min_local=4)


def test_damage_is_kl_of_the_forced_distributions(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, pruner = tiny_model(), TokenPruner(SCHEDULE, scorers.Recent())
    examples = [
        {"id": "a", "prompt_ids": PROMPT, "response_ids": RESPONSE},
        {"id": "b", "prompt_ids": PROMPT[:20], "response_ids": [7]},
    ]
    calls: list[int] = []
    found = damages(model, pruner, examples, lambda n: [NOTHING, SCHEDULE], lambda: calls.append(1))
    assert len(calls) == 6
    for example, (nothing, pruned) in zip(examples, found, strict=True):
        prompt, response = example["prompt_ids"], example["response_ids"]
        assert (nothing.kl, nothing.loss, nothing.kept_share) == (0.0, 0.0, 1.0)
        # Every token of the vocabulary, each as the response's last one.
        kl = 0.0
        for place in range(len(response)):
            log_p, log_q = (
                torch.stack([force(model, prompt, [*response[:place], v], p).log_probs[-1] for v in range(128)])
                for p in (None, pruner)
            )
            kl += float((log_p.double().exp() * (log_p.double() - log_q.double())).sum()) / len(response)
        assert pruned.kl == pytest.approx(kl, rel=1e-3)
        assert pruned.kl > 1e-4
        unpruned, under = force(model, prompt, response), force(model, prompt, response, pruner)
        assert pruned.loss == pytest.approx(float((unpruned.log_probs - under.log_probs).mean()), abs=1e-5)
        assert pruned.kept_share == under.kept_tokens / len(prompt)


@pytest.mark.parametrize(
    ("everywhere", "message"),
    [
        (True, "loss of the unpruned model on example 'a' is nan"),
        (False, "loss of example 'a', of whose 40 tokens [20, 10] are left is nan"),
    ],
)
def test_an_overflow_is_refused_and_no_damage(
    tiny_model: Callable[..., PreTrainedModel], everywhere: bool, message: str
) -> None:
    """As of float16: in every forward, or where the last layer gets fewer tokens than the prompt has."""
    model = tiny_model()

    def overflow(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        tokens = args[0].shape[1]
        return out * math.inf if everywhere or len(RESPONSE) < tokens < len(PROMPT) else out

    model.model.layers[3].register_forward_hook(overflow)
    pruner = TokenPruner(SCHEDULE, scorers.Recent())
    with pytest.raises(UserError, match=re.escape(message)):
        damages(
            model,
            pruner,
            [{"id": "a", "prompt_ids": PROMPT, "response_ids": RESPONSE}],
            lambda n: [SCHEDULE],
            lambda: None,
        )


def test_every_task_counts_alike() -> None:
    weights = task_weights(["a", "b", "a", "a"])
    assert weights == pytest.approx([4 / 6, 4 / 2, 4 / 6, 4 / 6])
    values = np.array([1.0, 10.0, 2.0, 3.0])
    assert float(np.mean(values * weights)) == pytest.approx((2.0 + 10.0) / 2)


class TestCurve:
    def test_meets_what_was_measured_and_rises_between(self) -> None:
        curve = DamageCurve([0.2, 0.8, 0.5], [3.0, 0.5, 1.0])
        assert [curve(f) for f in (1.0, 0.8, 0.5, 0.2)] == pytest.approx([0.0, 0.5, 1.0, 3.0])
        values = [curve(f) for f in np.linspace(1.0, 0.05, 200)]
        assert (np.diff(values) >= -1e-12).all()

    def test_noise_is_evened_out_and_never_negative(self) -> None:
        curve = DamageCurve([0.9, 0.7, 0.5, 0.3], [-1.0, 2.0, 1.0, 5.0])
        assert [curve(f) for f in (0.9, 0.7, 0.5, 0.3)] == pytest.approx([0.0, 1.5, 1.5, 5.0])

    def test_equal_fractions_are_averaged_by_their_number(self) -> None:
        # 0.5 was left three times; together with 0.4 it is one step, (3 * 4 + 2) / 4.
        curve = DamageCurve([0.5, 0.4, 0.5, 0.5], [3.0, 2.0, 4.0, 5.0])
        assert curve(0.5) == pytest.approx(3.5)
        assert curve(0.4) == pytest.approx(3.5)

    def test_goes_on_below_the_lowest_fraction(self) -> None:
        steep = DamageCurve([0.5, 0.25], [1.0, 3.0])
        assert steep(0.125) == pytest.approx(5.0)  # 2 a halving, as between the last two
        flat = DamageCurve([0.5, 0.25], [2.0, 2.0])
        assert flat(0.125) == pytest.approx(3.0)  # 1 a halving, as over the whole

    def test_is_straight_in_the_logarithm_where_the_measurements_are(self) -> None:
        curve = DamageCurve([0.5, 0.25], [1.0, 2.0])
        assert curve(math.sqrt(0.5)) == pytest.approx(0.5)

    @pytest.mark.parametrize("fractions", [[], [1.0], [0.0], [0.5, 1.2]])
    def test_refuses_fractions_that_are_none(self, fractions: list[float]) -> None:
        with pytest.raises(ValueError, match="fractions are"):
            DamageCurve(fractions, [1.0] * len(fractions))
