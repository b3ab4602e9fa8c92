"""What a scorer is trained to do: agree with saliency in order and in size."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Rows of the pair matrix held at once: at 32K tokens a block is 32 MB where the whole matrix is 4 GB.
_BLOCK = 256


def pairwise_ranking(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of `softplus(-(s_i - s_j))` over the ordered pairs with `target_i > target_j` (paper §3.2; RankNet).

    Exact over all pairs, in memory O(n) for a block of rows: the pairs are formed again in the backward pass. The
    gradient flows to `scores` only, and only once (no second derivatives).

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
    """Row blocks of the pair matrix, in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # Sums of many blocks are kept in float64, so that the mean does not depend on the block size.
        total = torch.zeros((), dtype=torch.float64, device=scores.device)
        pairs = torch.zeros((), dtype=torch.float64, device=scores.device)
        for rows in range(0, len(values), _BLOCK):
            above = target[rows : rows + _BLOCK, None] > target  # [block, n]
            loss = functional.softplus(values - values[rows : rows + _BLOCK, None])
            total += loss.masked_fill(~above, 0).sum(dtype=torch.float64)
            pairs += above.sum()
        pairs = pairs.clamp_min(1)
        ctx.save_for_backward(scores, target, pairs)
        return (total / pairs).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        scores, target, pairs = ctx.saved_tensors
        values = scores.to(torch.promote_types(scores.dtype, torch.float32))
        gradient = torch.zeros_like(values, dtype=torch.float64)
        for rows in range(0, len(values), _BLOCK):
            block = slice(rows, rows + _BLOCK)
            above = target[block, None] > target
            # d softplus(s_j - s_i) / d s_j = sigmoid(s_j - s_i), and its negative for s_i.
            weight = torch.sigmoid(values - values[block, None]).masked_fill(~above, 0)
            gradient[block] -= weight.sum(1, dtype=torch.float64)
            gradient += weight.sum(0, dtype=torch.float64)
        return (gradient / pairs * grad_output).to(scores.dtype), None


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
