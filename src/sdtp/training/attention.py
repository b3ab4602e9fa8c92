"""Attention that weighs keys by a mask through which gradients flow, also to keys the mask hides."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdtp_masked_keys"

# Query rows whose attention matrix the backward pass holds at once.
_BLOCK = 256


def masked_key_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal attention with probabilities `p_ij = m_ij e^{a_ij} / sum_k m_ik e^{a_ik}`, `a` the scaled dot products.

    A key with `m = 0` has no part in the result, exactly as if it had been removed, yet its mask gets a gradient: how
    the result would change if the key came back. The derivative at 0 would be of no use for that. It grows with
    `r = e^{a_j} / sum_k m_k e^{a_k}`, without bound where few keys are left and attention wants the hidden one, while
    the key, once back, weighs `r / (1 + r)` and not more. The gradient is the slope between hidden and back, which has
    that weight; for a visible key, weighing `r`, it is the derivative.

    The attention matrix is formed in blocks of rows in the backward pass, from logarithms: `r` itself need not fit a
    float.

    Args:
        query, key, value: [batch, heads, tokens, head_dim]; `value` may have another head_dim.
        mask: [batch, 1, tokens, tokens] float, 0 or 1; rows are queries. Entries above the diagonal are ignored.
        scaling: factor of the dot products.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    result: torch.Tensor = _MaskedKeyAttention.apply(query, key, value, mask, scaling)
    return result


class _MaskedKeyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        bias = mask.tril().log().to(query.dtype)  # 0 for 1, -inf for 0
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, mask = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        grad_mask = torch.zeros_like(mask)
        for start in range(0, query.shape[2], _BLOCK):
            end = min(start + _BLOCK, query.shape[2])
            rows = slice(start, end)
            seen = slice(0, end)  # later keys are in the future of every row of the block
            q, k, v = query[:, :, rows], key[:, :, seen], value[:, :, seen]
            g = grad_output[:, :, rows]
            scores = (q @ k.mT).to(wide) * ctx.scaling  # [batch, heads, block, end]
            causal = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
            scores.masked_fill_(~causal, -torch.inf)
            weight = mask[:, :, rows, seen].to(wide)
            probability = scores + weight.log()
            normaliser = probability.logsumexp(-1, keepdim=True)
            probability.sub_(normaliser).exp_()
            gain = (g @ v.mT).to(wide)  # d loss / d probability
            mean_gain = (probability * gain).sum(-1, keepdim=True)
            gain.sub_(mean_gain)
            # What a key weighs once it is visible, r / (1 + (1 - m) r): unchanged for those that are. An r beyond any
            # float has 1/r = 0, and a future key has r = 0 and 1/r infinite; both come out right.
            visible = (normaliser - scores).exp_().add_(1 - weight).reciprocal_()
            grad_mask[:, :, rows, seen] = visible.mul_(gain).sum(1, keepdim=True).to(mask.dtype)
            grad_value[:, :, seen] += (probability.to(g.dtype).mT @ g).to(wide)
            grad_scores = probability.mul_(gain).mul_(ctx.scaling).to(q.dtype)
            grad_query[:, :, rows] = grad_scores @ k
            grad_key[:, :, seen] += (grad_scores.mT @ q).to(wide)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_mask, None


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls: a floating mask, 0 or 1, weighs keys, anything else is sdpa's."""
    if attention_mask is None or not attention_mask.is_floating_point():
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} cannot be trained through: {type(module).__name__} uses it")
    groups = query.shape[1] // key.shape[1]
    result = masked_key_attention(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
