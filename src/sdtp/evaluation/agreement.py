"""How closely a pruned model's predictions of a response agree with the unpruned model's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from sdtp.errors import UserError
from sdtp.training.response import response_kl


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of one response.

    Attributes:
        kl: KL(unpruned || pruned), nats a response token, mean over the response's tokens; 0 where nothing differs, nan
            where a logit is no number or infinite.
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
    kl = response_kl(logits, unpruned).item()
    return 0.0 if kl < 0.0 else kl  # rounding may put a divergence of 0 below it; nan stays, which max() may drop


def check_finite(where: str, values: Mapping[str, float]) -> None:
    """Refuse a measurement of an overflow, which would rank as if it were one of a model.

    Args:
        where: the example and what ran on it, for the message.
        values: what was measured, by name.

    Raises:
        UserError: one of the values is not finite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} of {where} is {value}: the model's logits are not finite there. In float16 states "
                "overflow that bfloat16 and float32 hold (model.dtype)"
            )
