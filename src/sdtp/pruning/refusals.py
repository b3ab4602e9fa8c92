"""What a forward pass under a pruner is refused for before any of its layers has run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.cache_utils import BaseQuantizedLayer, Cache

from sdtp.pruning.adapter import Architecture, cache_of
from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.generating import Generation
from sdtp.pruning.layer_inputs import check_flash_window
from sdtp.pruning.prefill import Prefill
from sdtp.pruning.schedule import PruningSchedule

# What tells a flash kernel where packed sequences end.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def refuse_batching(name: str, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the methods of continuous batching."""
    raise ValueError(
        f"{name} is not supported under a pruner: continuous batching keeps one length for all layers; use generate "
        "with a batch of padded prompts"
    )


def check_packed(given: Mapping[str, Any]) -> None:
    """Refuse several sequences in one row."""
    for name in _PACKED:
        if given.get(name) is not None:
            raise ValueError(f"{name} tells of several packed sequences, which is not supported under a pruner")


def check_mask(mask: Any, shape: tuple[int, int], held: int) -> None:
    """Refuse an attention mask that is not [batch, tokens held and new]."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ValueError(
            "attention_mask under a pruner is [batch, tokens], 1 at real tokens: masks of 4 dimensions are not "
            "supported"
        )
    if tuple(mask.shape) != (shape[0], held + shape[1]):
        raise ValueError(
            f"attention_mask is of shape {tuple(mask.shape)}: for {shape[1]} tokens after {held} in the cache it is "
            f"[{shape[0]}, {held + shape[1]}]"
        )


def check_whole_prompt(cache: Any, generation: Generation, mask: torch.Tensor | None) -> None:
    """Refuse what `generate` would feed wrong beside a filled cache.

    A question alone after a pruned prompt: it takes the first tokens for those in the cache. And candidates, with which
    it feeds the tokens in the cache again.
    """
    if generation.candidates and isinstance(cache, Cache) and cache.get_seq_length() > 0:
        raise ValueError(
            "assistant_model and prompt_lookup_num_tokens are not supported under a pruner with a cache that holds "
            f"tokens (here {cache.get_seq_length()}): generate then feeds those again"
        )
    first = next(iter(getattr(cache, "layers", ())), None)
    columns = generation.prompt_columns
    if isinstance(first, PrunedLayer) and columns <= first.seen and (mask is None or mask.shape[1] == columns):
        raise ValueError(
            f"the cache holds {first.seen} tokens and generate was given {columns}: give it the ids of all, those in "
            "the cache first, or the attention_mask of all"
        )


def check_rows(held: Any, rows: int, mask: torch.Tensor | None) -> None:
    """Refuse to continue a pruned cache with other rows, or with padding that nobody tells the model of."""
    if not isinstance(held, PrunedLayer):
        return
    if held.rows != rows:
        raise ValueError(f"the cache holds {held.rows} rows and the model was called with {rows}")
    if held.padded and mask is None:
        raise ValueError(
            "this cache holds rows with padding: give the attention_mask of all tokens, those in the cache first"
        )


def check_keys_at_hand(
    architecture: Architecture, schedule: PruningSchedule, given: Mapping[str, Any], tokens: int
) -> None:
    """Refuse what leaves `LastQuery` without the keys of the layer before a stage.

    Args:
        architecture, schedule: of the model and the pruner.
        given: the decoder's arguments.
        tokens: of the forward.
    """
    cache, use_cache = cache_of(given), given.get("use_cache")
    if cache is None and not (architecture.config.use_cache if use_cache is None else use_cache):
        raise ValueError("LastQuery reads the keys of the layer before: call the model with use_cache=True")
    for held in () if cache is None else cache.layers:
        if isinstance(held, BaseQuantizedLayer):
            raise ValueError(
                f"LastQuery reads the keys of the layer before, and a {type(held).__name__} does not hold them as they "
                "were: use a DynamicCache, or another scorer"
            )
    for layer in schedule.layers:
        window = architecture.windows[layer - 1]
        if window is not None and tokens >= window:  # a window's cache leaves out what the next token does not see
            raise ValueError(
                f"LastQuery is not supported before layer {layer} with a prompt of {tokens} tokens: the cache of layer "
                f"{layer - 1} holds the latest {window - 1} only"
            )


def check_flash(architecture: Architecture, layers: Iterable[int], tokens: int) -> None:
    """Refuse a sequence longer than the window of a layer of survivors, where a flash kernel would count it in them.

    Args:
        architecture: of the model.
        layers: that hold survivors, or will.
        tokens: of the sequence, removed ones included.
    """
    if "flash" in architecture.config._attn_implementation:
        for layer in layers:
            check_flash_window(architecture.config, architecture.windows[layer], tokens)


def check_logits_to_keep(schedule: PruningSchedule, prefill: Prefill, asked: Any) -> None:
    """Refuse logits of tokens that may be removed."""
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise ValueError(f"logits_to_keep={asked!r} is not supported in a pruned prefill: give a number from 0 on")
    for total in prefill.prompt_lengths:
        counts = [total, *schedule.surviving(total)]
        tail = schedule.protected_tail(counts[-2]) if schedule.stages else total
        if counts[-1] < total and asked - prefill.extra > tail:
            raise ValueError(
                f"logits_to_keep={asked} reaches past the protected tail of {tail} tokens of a pruned prompt of "
                f"{total}: raise local or min_local, or keep fewer"
            )
