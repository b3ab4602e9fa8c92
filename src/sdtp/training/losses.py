"""What a scorer is trained to do: agree with saliency in order and in size."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Pairs held at once. On the CPU 2 MB of float32, which stay in a core's cache; on a GPU so few would cost more launches
# than arithmetic (its number is not tuned).
_BLOCK_ON_CPU = 2**19
_BLOCK_ON_GPU = 2**23
# Above this `softplus` is the identity, to the last digit of float64. The default of torch, 20, is not.
_LINEAR = 40.0


def pairwise_ranking(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of `softplus(-(s_i - s_j))` over the ordered pairs with `target_i > target_j` (paper §3.2; RankNet).

    Exact over all pairs, in memory O(n) and a block of pairs. The gradient is computed with the value, from the same
    block; it flows to `scores` only, and only once (no second derivatives).

    Args:
        scores: [n], any floating dtype; computed in float32 at least.
        target: [n] without NaN; equal targets form no pair.

    Returns:
        A scalar of the dtype of `scores`; 0 on the graph where there is no pair.

    Raises:
        ValueError: shapes other than [n], [n], or a NaN target, which would silently form no pair.
    """
    if scores.ndim != 1 or scores.shape != target.shape:
        raise ValueError(
            f"scores and target have shapes {tuple(scores.shape)} and {tuple(target.shape)}: both must be [n]"
        )
    if target.isnan().any():
        raise ValueError(f"target has {int(target.isnan().sum())} NaN of {len(target)}: numbers are accepted")
    loss: torch.Tensor = _PairwiseRanking.apply(scores, target.detach())
    return loss


class _PairwiseRanking(torch.autograd.Function):
    """Value and gradient in one pass over the pairs."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        descending, order = target.sort(descending=True, stable=True)
        values = scores[order].to(torch.promote_types(scores.dtype, torch.float32))
        total, pairs, sorted_gradient = _sums_over_pairs(values, descending)
        gradient = torch.empty_like(values)
        gradient[order] = (sorted_gradient / max(1, pairs)).to(values.dtype)
        ctx.save_for_backward(gradient)
        return (total / max(1, pairs)).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(grad_output.dtype), None


def _sums_over_pairs(values: torch.Tensor, descending: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Losses of all pairs, summed, their number, and the gradient of that sum.

    In descending order of the targets, the partners of token i are all tokens from the first lower target on: half of
    the pair matrix is never touched, and only where a block's rows begin at different columns is there any to mask.

    Args:
        values: [n] scores in descending order of their targets, float32 or float64.
        descending: [n] these targets.

    Returns:
        The sum (a float64 scalar), the number of pairs, and the gradient [n] in float64.
    """
    tokens = len(values)
    _, sizes = descending.unique_consecutive(return_counts=True)
    lower = sizes.cumsum(0).repeat_interleave(sizes)  # [n], the first token of a lower target
    columns = torch.arange(tokens, device=values.device)
    first_lower = lower.tolist()
    with_partners = sum(first < tokens for first in first_lower)
    block = _BLOCK_ON_CPU if values.device.type == "cpu" else _BLOCK_ON_GPU
    # Blocks add up in float64, so that the mean does not depend on their size.
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    gradient = torch.zeros(tokens, dtype=torch.float64, device=values.device)
    start = 0
    while start < with_partners:
        begin = first_lower[start]
        stop = min(with_partners, start + max(1, block // (tokens - begin)))
        settled = first_lower[stop - 1]  # from this column on all rows of the block have partners
        differences = values[begin:] - values[start:stop, None]  # s_j - s_i, [rows, columns]
        no_pair = columns[begin:settled] < lower[start:stop, None]
        differences[:, : settled - begin].masked_fill_(no_pair, -torch.inf)
        total += functional.softplus(differences, threshold=_LINEAR).sum()
        # d softplus(s_j - s_i) / d s_j = sigmoid(s_j - s_i), and its negative for s_i.
        weight = differences.sigmoid_()
        gradient[start:stop] -= weight.sum(1)
        gradient[begin:] += weight.sum(0)
        start = stop
    return total, sum(tokens - first for first in first_lower), gradient


def standardise(saliency: torch.Tensor) -> torch.Tensor:
    """Saliency of one example at one stage as a regression target: normal scores of its ranks.

    Saliency is heavy-tailed (the attention sink carries most of it) and may be signed, so its size is no usable scale
    and its logarithm not always defined. The i-th of n tokens in ascending order gets the quantile (i - 1/2) / n of the
    standard normal distribution; equal saliencies get their mean rank.

    Args:
        saliency: [n], finite.

    Returns:
        [n] float32, mean 0 and standard deviation about 1.
    """
    _, group, sizes = saliency.unique(return_inverse=True, return_counts=True)
    mean_rank = sizes.cumsum(0) - (sizes - 1) / 2  # from 1
    quantile = (mean_rank.double() - 0.5) / len(saliency)
    return torch.special.ndtri(quantile)[group].float()


def standardised_mse(scores: torch.Tensor, standardised: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between scores and standardised saliency (paper §3.2).

    Args:
        scores: [n] float32, n >= 1.
        standardised: [n], as `standardise` gives it for this stage and example.

    Returns:
        A scalar.
    """
    return (scores - standardised).square().mean()
