"""Agreement with the unpruned model, against distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sdtp.errors import UserError
from sdtp.evaluation.agreement import agreement, check_finite

# Probabilities of three tokens at two places.
UNPRUNED = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]])
PRUNED = torch.tensor([[1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 4, 1 / 2]])
KL = [
    math.log(4) / 2 + math.log(1 / 3) / 4 + math.log(2) / 4,
    math.log(1 / 2) / 8 + math.log(1 / 2) / 8 + 3 * math.log(3 / 2) / 4,
]


def test_is_the_mean_over_tokens_of_the_divergence_from_the_unpruned_model() -> None:
    found = agreement(PRUNED.log() + torch.tensor([[7.0], [-3.0]]), UNPRUNED.log())  # a shift changes no probability
    assert found.kl == pytest.approx(sum(KL) / 2, rel=1e-6)
    assert found.top1 == 0.5
    for place, same in enumerate((0.0, 1.0)):
        one = agreement(PRUNED[place : place + 1].log(), UNPRUNED[place : place + 1].log())
        assert (one.kl, one.top1) == (pytest.approx(KL[place], rel=1e-6), same)
    # The other way round it is another number.
    assert agreement(UNPRUNED.log(), PRUNED.log()).kl != pytest.approx(sum(KL) / 2, rel=0.01)


def test_with_itself_it_is_whole_and_never_negative() -> None:
    logits = torch.randn(40, 500)
    itself = agreement(logits, logits)
    assert (itself.kl, itself.top1) == (0.0, 1.0)
    for seed in range(5):
        other = logits + 1e-6 * torch.randn(40, 500, generator=torch.Generator().manual_seed(seed))
        assert 0.0 <= agreement(other, logits).kl < 1e-6


def test_is_computed_in_float32_whatever_the_models_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    pruned, unpruned = (torch.randn(20, 1000, generator=generator).mul(4).bfloat16() for _ in range(2))
    log_q, log_p = (one.double().log_softmax(-1) for one in (unpruned, pruned))
    expected = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    assert agreement(pruned, unpruned).kl == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_an_overflow_is_no_agreement(value: float, side: int) -> None:
    logits = [PRUNED.log(), UNPRUNED.log()]
    logits[side][1, 2] = value
    with pytest.raises(UserError, match=r"kl of example 'a' is (nan|inf): the model's logits are not finite there"):
        check_finite("example 'a'", {"loss": 1.0, "kl": agreement(*logits).kl})


def test_refuses_other_places() -> None:
    with pytest.raises(ValueError, match=r"logits are \(1, 3\) and their reference \(2, 3\): must be equal"):
        agreement(PRUNED[:1].log(), UNPRUNED.log())
