"""How a scorer's weights are updated, alike in both parts of stage 2."""

from __future__ import annotations

import torch
from torch import nn, optim
from transformers import get_cosine_schedule_with_warmup

# Largest norm of an update's gradient: updates see few examples, and one that is steep must not undo the others.
GRADIENT_CLIP = 1.0

_WEIGHT_DECAY = 0.01


def adamw(module: nn.Module, learning_rate: float, updates: int) -> tuple[optim.AdamW, optim.lr_scheduler.LambdaLR]:
    """AdamW over the module's weights, and its learning rate: a linear rise over a tenth of the updates, then a cosine.

    Args:
        module: what is trained.
        learning_rate: the peak.
        updates: how many there will be; the rate is 0 after the last.
    """
    optimizer = optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, max(1, updates // 10), updates)


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
