"""Attention that weighs keys by a mask through which gradients flow, also to keys the mask hides."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Query rows whose attention matrix the backward pass holds at once.
_BLOCK = 256


class AdditiveMasks:
    """What scaled_dot_product_attention adds to scores under a key mask, kept while that key mask is asked for.

    The layers between two stages are handed the same key mask, so it is made once for them all; once for each window,
    where they differ in that. Asking with another key mask drops it before the next is made: for 32K tokens it takes
    2 GB in bfloat16.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop what is kept."""
        self._kept: tuple[torch.Tensor | None, dict[Any, torch.Tensor]] = None, {}

    def of(self, mask: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[batch, 1, tokens, tokens] of that dtype, 0 where a query sees a key and minus infinity elsewhere.

        Args:
            mask, window: as of `masked_key_attention`; a key mask is known by being the same tensor.
            dtype: of the queries, since a mask of another is copied.
        """
        known, made = self._kept
        if known is not mask:
            made = {}
            self._kept = mask, made
        if (window, dtype) not in made:
            made[window, dtype] = _additive(mask, window, dtype)
        return made[window, dtype]


def masked_key_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    window: int | None = None,
    masks: AdditiveMasks | None = None,
) -> torch.Tensor:
    """Causal attention with probabilities `p_ij = m_j e^{a_ij} / sum_k m_k e^{a_ik}`, `a` the scaled dot products.

    A query always sees itself: `m_i` is 1 in its own row. A key with `m = 0` has no part in the result, exactly as if
    it had been removed, yet its mask gets a gradient: how the result would change if the key came back. The derivative
    at 0 would be of no use for that. It grows with `r = e^{a_j} / sum_k m_k e^{a_k}`, without bound where few keys are
    left and attention wants the hidden one, while the key, once back, weighs `r / (1 + r)` and not more. The gradient
    is the slope between hidden and back, which has that weight; for a visible key, weighing `r`, it is the derivative.

    The attention matrix is formed in blocks of rows in the backward pass, in float32 at least, as the kernels of the
    forward pass form it, and from logarithms: `r` itself need not fit a float. Rows through which no gradient comes are
    left out: those of removed tokens, which nothing after them reads.

    Args:
        query, key, value: [batch, heads, tokens, head_dim]; `value` may have another head_dim.
        mask: [batch, 1, 1, tokens] float, 0 or 1, of each key.
        scaling: factor of the dot products.
        window: a query sees the keys less than so many tokens before it; None for all.
        masks: where calls with the same key mask find what is made of it; None makes it for this one.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    if torch.is_autocast_enabled(query.device.type):  # as the kernels this stands for: rotary tables widen queries
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    added = (AdditiveMasks() if masks is None else masks).of(mask, window, query.dtype)
    result: torch.Tensor = _MaskedKeyAttention.apply(query, key, value, mask, added, scaling, window)
    return result


def masked_softmax(
    scores: torch.Tensor,
    mask: torch.Tensor,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The probabilities of `masked_key_attention`, with its gradients, from scores that were computed elsewhere.

    For attention that does more to its scores than scale them. The whole matrix is kept for the backward pass.

    Args:
        scores: [batch, heads, tokens, tokens], rows are queries. Keys they exclude by themselves, with minus infinity
            or the lowest number, stay excluded and give no gradient.
        mask, window: as of `masked_key_attention`.
        sink: [heads], one more score in every row's sum, of no key; None for none.
        dtype: of the result, no narrower than `scores`, which are kept as they are; None for theirs.

    Returns:
        [batch, heads, tokens, tokens], computed in float32 at least. Rows sum to 1, with a sink to less.
    """
    probability: torch.Tensor = _MaskedSoftmax.apply(scores, mask, window, sink, dtype or scores.dtype)
    return probability


class _Rows:
    """What some query rows may see of the keys up to the last of them: bool [rows, keys] or [batch, 1, rows, keys].

    Attributes:
        own: the query itself.
        seen: neither in the future, nor before the window, nor hidden.
        hidden: neither in the future nor before the window, but not seen.
    """

    def __init__(self, mask: torch.Tensor, rows: torch.Tensor, keys: int, window: int | None) -> None:
        # Comparisons, not distances: at 32K tokens a matrix of integers would take 8 GB.
        own, keys_seen = rows[:, None], torch.arange(keys, device=rows.device)
        near = own >= keys_seen if window is None else (own >= keys_seen) & (keys_seen > own - window)
        self.own = own == keys_seen
        self.seen = ((mask[..., :keys] != 0) | self.own) & near
        self.hidden = self.seen ^ near

    def probability(self, scores: torch.Tensor, sink: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each key, and the logarithm [..., rows, 1] of the sum that it was divided by."""
        seen = scores.masked_fill(~self.seen, -torch.inf)
        highest = seen.amax(-1, keepdim=True)
        weights = seen.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total += (sink[:, None, None] - highest).exp()
        return weights.div_(total), highest + total.log()

    def mask_gradient(
        self, scores: torch.Tensor, normaliser: torch.Tensor, probability: torch.Tensor, gain: torch.Tensor
    ) -> torch.Tensor:
        """[batch, 1, 1, keys], summed over heads and rows; `gain` is the loss's slope along each key's probability."""
        # What a hidden key would weigh, r / (1 + r) = sigmoid(log r); a visible one weighs its probability.
        weight = torch.where(self.hidden, torch.sigmoid(scores - normaliser), probability)
        return weight.mul_(gain).masked_fill_(self.own, 0).sum((1, 2))[:, None, None]


def _additive(mask: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """What `AdditiveMasks` keeps; beside it no matrix of all rows is made."""
    tokens = mask.shape[-1]
    # Rows begin at multiples of 8 numbers: where they do not, kernels of GPUs make a copy in each layer.
    added = mask.new_full((len(mask), 1, tokens, -(-tokens // 8) * 8), -torch.inf, dtype=dtype)[..., :tokens]
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        view = _Rows(mask, torch.arange(start, end, device=mask.device), end, window)
        added[:, :, start:end, :end].masked_fill_(view.seen, 0)
    return added


def _product(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`one @ other`, [batch, heads, rows, columns], summed and left in a dtype that may be wider than theirs.

    Rounded to bfloat16, scores of 50 are off by 0.1 and the probabilities made of them by a tenth.
    """
    with torch.autocast(one.device.type, enabled=False):  # the backward pass may run under it
        if one.dtype == dtype:
            return one @ other
        if one.is_cuda:  # no wide copies, and the speed of narrow factors
            result = torch.bmm(one.flatten(0, 1), other.flatten(0, 1), out_dtype=dtype)
            return result.unflatten(0, one.shape[:2])
        return one.to(dtype) @ other.to(dtype)


class _MaskedKeyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        added: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling, ctx.window = scaling, window
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        query, key, value, mask = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.zeros_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        grad_mask = torch.zeros_like(mask, dtype=wide)
        alive = (grad_output != 0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0]
        for rows in alive.split(_BLOCK) if len(alive) else ():  # none where an example counts for nothing
            end = int(rows[-1]) + 1  # later keys are in the future of every row of the block
            q, k, v = query.index_select(2, rows), key[:, :, :end], value[:, :, :end]
            g = grad_output.index_select(2, rows)
            view = _Rows(mask, rows, end, ctx.window)
            scores = _product(q, k.mT, wide) * ctx.scaling  # [batch, heads, rows, end]
            probability, normaliser = view.probability(scores)
            gain = _product(g, v.mT, wide)  # d loss / d probability
            gain.sub_((probability * gain).sum(-1, keepdim=True))
            grad_mask[..., :end] += view.mask_gradient(scores, normaliser, probability, gain)
            grad_value[:, :, :end] += _product(probability.to(g.dtype).mT, g, wide)
            grad_scores = probability.mul_(gain).mul_(ctx.scaling).to(q.dtype)
            grad_query.index_copy_(2, rows, grad_scores @ k)
            grad_key[:, :, :end] += _product(grad_scores.mT, q, wide)
        gradients = grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_mask.to(mask.dtype)
        return *gradients, None, None, None


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        mask: torch.Tensor,
        window: int | None,
        sink: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(scores, mask, sink)
        ctx.window, ctx.wide = window, torch.promote_types(dtype, torch.float32)
        _, _, probability, _ = _all_rows(scores, mask, window, sink, ctx.wide)
        return probability.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        scores, mask, sink = ctx.saved_tensors
        view, wide, probability, normaliser = _all_rows(scores, mask, ctx.window, sink, ctx.wide)
        gain = grad_output.to(ctx.wide)
        gain = gain - (probability * gain).sum(-1, keepdim=True)
        grad_mask = view.mask_gradient(wide, normaliser, probability, gain)
        return probability.mul_(gain).to(scores.dtype), grad_mask.to(mask.dtype), None, None, None


def _all_rows(
    scores: torch.Tensor, mask: torch.Tensor, window: int | None, sink: torch.Tensor | None, dtype: torch.dtype
) -> tuple[_Rows, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the rows see, the scores in that dtype, the probabilities, and what they were divided by."""
    tokens = scores.shape[-1]
    view = _Rows(mask, torch.arange(tokens, device=scores.device), tokens, window)
    wide = scores.to(dtype)
    return view, wide, *view.probability(wide, sink)
