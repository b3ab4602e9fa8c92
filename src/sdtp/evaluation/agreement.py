"""How closely a pruned model's predictions of a response agree with the unpruned model's."""

from __future__ import annotations

import dataclasses

import torch

from sdtp.training.response import response_kl


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of one response.

    Attributes:
        kl: KL(unpruned || pruned), nats a response token, mean over the response's tokens; 0 where nothing differs.
        top1: share of the response's tokens whose most probable token is the same, in [0, 1].
    """

    kl: float
    top1: float


def agreement(logits: torch.Tensor, unpruned: torch.Tensor) -> Agreement:
    """Compare next-token distributions, in float32 at least; no tensor as large as the arguments is made.

    Args:
        logits: [response, vocabulary], the pruned model's at the places that predict the response's tokens.
        unpruned: [response, vocabulary], the unpruned model's there.

    Raises:
        ValueError: shapes that differ.
    """
    kl = divergence(logits, unpruned)
    same = logits.argmax(-1) == unpruned.argmax(-1)
    return Agreement(kl, float(same.double().mean()))


def divergence(logits: torch.Tensor, unpruned: torch.Tensor) -> float:
    """`Agreement.kl` alone; arguments and errors as `agreement` has them."""
    return max(0.0, response_kl(logits, unpruned).item())  # rounding may put a divergence of 0 below it
