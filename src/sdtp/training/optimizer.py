"""How a scorer's weights are updated, alike in both parts of stage 2."""

from __future__ import annotations

import math

import torch
from torch import nn, optim

# Largest norm of an update's gradient: updates see few examples, and one that is steep must not undo the others.
GRADIENT_CLIP = 1.0

_WEIGHT_DECAY = 0.01


def adamw(module: nn.Module, learning_rate: float, updates: int) -> tuple[optim.AdamW, optim.lr_scheduler.LambdaLR]:
    """AdamW over the module's weights, and its learning rate: a linear rise over a tenth of the updates, then a cosine.

    Every update has a rate above 0, the first included: there may be few of them, and at rate 0 one is lost. The peak
    is that of the last update of the rise; the rate after the last update would be 0.

    Args:
        module: what is trained.
        learning_rate: the peak.
        updates: how many there will be, at least one.
    """
    optimizer = optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    rise = max(1, updates // 10)

    def share(done: int) -> float:
        if done < rise:
            return (done + 1) / rise
        return (1 + math.cos(math.pi * (done + 1 - rise) / (updates + 1 - rise))) / 2

    return optimizer, optim.lr_scheduler.LambdaLR(optimizer, share)


def flat_gradients(module: nn.Module) -> torch.Tensor:
    """One vector of zeros that the gradients of all weights are views of: summed, sent and cleared as one.

    Args:
        module: all weights on one device, in one dtype; what gradients they had is dropped.

    Returns:
        [weights], in the order of `module.parameters()`. A backward pass adds to it.
    """
    parameters = list(module.parameters())
    flat = parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters))
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat
