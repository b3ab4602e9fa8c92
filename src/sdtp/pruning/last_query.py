"""The attention that the last prompt token pays to the others in one layer: what LazyLLM and FastV rank tokens by."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from sdtp.pruning.cache import PrunedLayer


def check_attention(attention: Any, layer: int) -> None:
    """Refuse an attention whose queries and probabilities are not known here.

    Raises:
        TypeError: the layer's attention is built otherwise, with what is missing.
    """
    name = f"layer {layer}'s {type(attention).__name__}"
    if not hasattr(attention, "q_proj") or not hasattr(attention, "head_dim") or not hasattr(attention, "scaling"):
        raise TypeError(f"LastQuery is not supported with {name}: it has no q_proj, head_dim and scaling")
    if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        raise TypeError(f"LastQuery is not supported with {name}: its positions are not rotary")
    if not getattr(attention, "use_rope", True):
        raise TypeError(f"LastQuery is not supported with {name}: the layer has no rotary positions")
    for odd in ("sinks", "attn_logit_softcapping"):
        if getattr(attention, odd, None) is not None:
            raise TypeError(f"LastQuery is not supported with {name}: its attention has {odd}")
    norm = getattr(attention, "q_norm", None)
    if norm is not None and tuple(getattr(norm, "weight", torch.empty(0)).shape) != (attention.head_dim,):
        raise TypeError(
            f"LastQuery is not supported with {name}: its {type(norm).__name__} of queries is not over the "
            f"{attention.head_dim} channels of one head"
        )


def last_query_attention(
    attention: nn.Module, state: torch.Tensor, table: Any, held: Any, prompt_slots: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """[batch, prompt_slots] float32: attention of the last prompt token, averaged over heads.

    Args:
        attention: the layer's, as `check_attention` accepts.
        state: [batch, 1, hidden] of the last prompt token, normed as the attention sees it.
        table: (cos, sin) [batch or 1, 1, dim] of its position.
        held: the layer's cache, of all tokens present.
        prompt_slots: slots of the prompt; those after it are candidates.
        valid: [batch, prompt_slots] bool, True at real tokens; None if all are.

    Raises:
        ValueError: the cache does not hold the keys as the layer computed them, or the rotary table does not cover a
            head.
    """
    module: Any = attention
    if isinstance(held, PrunedLayer):
        held = held.held
    keys = held.keys
    if keys is None or keys.ndim != 4 or keys.shape[2] < prompt_slots:
        raise ValueError(
            f"LastQuery reads the keys of the layer before, and a {type(held).__name__} does not hold them all: use a "
            "DynamicCache, for a sliding window no longer prompt than the window, or another scorer"
        )
    query = module.q_proj(state).unflatten(-1, (-1, module.head_dim))
    if getattr(module, "q_norm", None) is not None:
        query = module.q_norm(query)
    query = query.transpose(1, 2)
    cos, sin = table
    if cos.shape[-1] != module.head_dim:
        raise ValueError(
            f"LastQuery is not supported where a rotary table covers {cos.shape[-1]} of {module.head_dim} channels"
        )
    # The rotation is the model family's own: the function its attention module calls.
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, _ = rotate(query, query, cos, sin)
    keys = keys[:, :, :prompt_slots].to(query.device)
    query = query.unflatten(1, (keys.shape[1], -1)).squeeze(-2)  # [batch, KV heads, queries per KV head, head_dim]
    with torch.autocast(query.device.type, enabled=False):  # scores in bfloat16 would tie
        logits = torch.einsum("bkgd,bknd->bkgn", query.float(), keys.float()) * module.scaling
    if valid is not None:
        logits = logits.masked_fill(~valid.to(logits.device)[:, None, None], -torch.inf)
    probabilities: torch.Tensor = logits.softmax(-1)
    return probabilities.mean((1, 2))
