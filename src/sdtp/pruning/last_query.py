"""The attention that the last prompt token pays to the others in one layer: what LazyLLM and FastV rank tokens by."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from sdtp.pruning.cache import PrunedLayer

# Norms of what an attention gives, which does not change what it pays attention to.
_OUTPUT_NORMS = ("attn_sub_norm", "groupnorm")


def check_attention(attention: Any, layer: int) -> None:
    """Refuse an attention whose queries and probabilities are not known here.

    Raises:
        TypeError: the layer's attention is built otherwise, with what is missing.
    """
    name = _named(attention, layer)
    if not hasattr(attention, "q_proj") or not hasattr(attention, "head_dim") or not hasattr(attention, "scaling"):
        raise TypeError(f"LastQuery is not supported with {name}: it has no q_proj, head_dim and scaling")
    if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        raise TypeError(f"LastQuery is not supported with {name}: its positions are not rotary")
    if not _rotates(attention):
        raise TypeError(f"LastQuery is not supported with {name}: the layer has no rotary positions")
    for owner, odd in (
        (attention, "sinks"),
        (attention, "attn_logit_softcapping"),
        (getattr(attention, "config", None), "clip_qkv"),
    ):
        if getattr(owner, odd, None) is not None:
            raise TypeError(f"LastQuery is not supported with {name}: its attention has {odd}")
    for part, module in attention.named_children():
        normed = "norm" in part.lower() or "norm" in type(module).__name__.lower()
        if normed and part not in ("q_norm", "k_norm", *_OUTPUT_NORMS):
            raise TypeError(
                f"LastQuery is not supported with {name}: norms of queries and keys before their rotation are known, "
                f"called q_norm and k_norm, and it has a {part}"
            )
    norm = getattr(attention, "q_norm", None)
    if norm is not None and tuple(getattr(norm, "weight", torch.empty(0)).shape) != (attention.head_dim,):
        raise TypeError(
            f"LastQuery is not supported with {name}: its {type(norm).__name__} of queries is not over the "
            f"{attention.head_dim} channels of one head"
        )


def _named(attention: Any, layer: int) -> str:
    return f"layer {layer}'s {type(attention).__name__}"


def _rotates(attention: Any) -> bool:
    """Whether a layer rotates queries and keys: some families do not where they attend to everything."""
    kind = getattr(getattr(attention, "config", None), "model_type", None)
    if kind in ("afmoe", "cohere2", "cohere2_moe"):
        return attention.sliding_window is not None or getattr(attention, "force_rope", False)
    if kind in ("exaone4", "exaone_moe", "kolibri1"):  # without any window all layers rotate
        return attention.sliding_window is None or attention.is_sliding
    return bool(getattr(attention, "use_rope", True))


def unknown_keys(attention: Any, layer: int) -> TypeError:
    """What to raise where `last_query_attention` found a key that it does not know."""
    return TypeError(
        f"LastQuery is not supported with {_named(attention, layer)}: a key in its cache is not k_proj's, normed by "
        "k_norm where it has one, and rotated, so that its queries are not known either"
    )


def last_query_attention(
    attention: nn.Module,
    state: torch.Tensor,
    table: Any,
    held: Any,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last prompt token, averaged over heads, and whether the layer is of a kind not known here.

    Args:
        attention: the layer's, as `check_attention` accepts.
        state: [batch, 1, hidden] of the last prompt token, normed as the attention sees it.
        table: (cos, sin) [batch or 1, 1, dim] of its position.
        held: the layer's cache, of all tokens present.
        positions: LongTensor [batch, slots] of the prompt; slots after it are candidates.
        valid: [batch, slots] bool, True at real tokens; None if all are.

    Returns:
        [batch, slots] float32; and a bool scalar: whether the last token's cached key is not what its state gives.

    Raises:
        ValueError: the cache does not hold the keys as the layer computed them, or the rotary table does not cover a
            head.
    """
    module: Any = attention
    if isinstance(held, PrunedLayer):
        held = held.held
    keys = held.keys
    if keys is None or keys.ndim != 4 or keys.shape[2] < held.get_seq_length():
        raise ValueError(
            f"LastQuery reads the keys of the layer before, and a {type(held).__name__} does not hold them all: use a "
            "DynamicCache, for a sliding window no longer prompt than the window, or another scorer"
        )
    cos, sin = table
    if cos.shape[-1] != module.head_dim:
        raise ValueError(
            f"LastQuery is not supported where a rotary table covers {cos.shape[-1]} of {module.head_dim} channels"
        )
    query, key = (
        _projected(module, state, projection, norm) for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm"))
    )
    # The rotation is the model family's own: the function its attention module calls.
    query, key = sys.modules[type(attention).__module__].apply_rotary_pos_emb(query, key, cos, sin)
    last = positions.argmax(1).to(keys.device)
    cached = keys[torch.arange(len(last), device=keys.device), :, last].to(key.device)  # [batch, KV heads, head_dim]
    keys = keys[:, :, : positions.shape[1]].to(query.device)
    query = query.unflatten(1, (keys.shape[1], -1)).squeeze(-2)  # [batch, KV heads, queries per KV head, head_dim]
    with torch.autocast(query.device.type, enabled=False):  # scores in bfloat16 would tie
        logits = torch.einsum("bkgd,bknd->bkgn", query.float(), keys.float()) * module.scaling
    if valid is not None:
        logits = logits.masked_fill(~valid.to(logits.device)[:, None, None], -torch.inf)
    probabilities: torch.Tensor = logits.softmax(-1)
    return probabilities.mean((1, 2)), _unlike(key.squeeze(-2), cached)


def _projected(attention: Any, state: torch.Tensor, projection: str, norm: str) -> torch.Tensor:
    """[batch, heads, 1, head_dim]: queries or keys of a token, not yet rotated."""
    heads = getattr(attention, projection)(state).unflatten(-1, (-1, attention.head_dim))
    if getattr(attention, norm, None) is not None:
        heads = getattr(attention, norm)(heads)
    return heads.transpose(1, 2)


def _unlike(key: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """Bool scalar: whether two keys differ by more than rounding, quantised weights' included.

    Each channel counts alike: where a few are large, a rotation may change the others alone.
    """
    key, cached = key.float(), cached.float()
    return ((key - cached).abs() / (key.abs() + cached.abs())).nanmean() > 0.1
