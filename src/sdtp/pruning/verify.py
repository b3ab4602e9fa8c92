"""Mask equals removal, on any supported model: the check a user can run on their own weights and prompts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.pruning.pruner import TokenPruner


def mask_equals_removal(model: nn.Module, pruner: TokenPruner, input_ids: torch.Tensor) -> float:
    """How far a pruned prefill is from the unpruned graph in which the removed tokens are hidden as keys.

    Both give the same logits at every survivor of the last stage, up to rounding: what is physically removed is exactly
    what later layers can no longer attend to.

    Args:
        model: a causal LM that `pruner` supports, with `sdpa` or `eager` attention.
        pruner: decides what is removed, in at least one stage; the masked forward replays its trace.
        input_ids: LongTensor [1, tokens], a prompt without padding.

    Returns:
        max |Δ logit| / max |logit| over the survivors.

    Raises:
        ValueError: more than one row, or a schedule without stages.
    """
    if not pruner.schedule.stages:
        raise ValueError("the schedule has no stages: nothing is removed")
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has {input_ids.shape[0]} rows: verification takes one prompt at a time")
    with torch.no_grad():
        with pruner(model) as trace:
            removed: torch.Tensor = model(input_ids).logits  # with its cache, which LastQuery reads
        survivors = trace.kept[-1][0]
        with hidden_keys(model, pruner.schedule.layers, [kept[0] for kept in trace.kept], input_ids.shape[1]):
            masked = model(input_ids, use_cache=False).logits[:, survivors]
    return float((removed - masked).abs().max() / masked.abs().max())


@contextlib.contextmanager
def hidden_keys(model: nn.Module, layers: tuple[int, ...], kept: list[torch.Tensor], tokens: int) -> Iterator[None]:
    """Inside, from each stage's layer on, every query sees only that stage's survivors among the keys (and itself).

    Args:
        model: a causal LM.
        layers: the stages' decoder layers, ascending.
        kept: per stage a LongTensor [survivors] of key positions.
        tokens: length of the forward passes inside; no cache is used.
    """
    modules = decoder_layers(model)
    weights = next(decoder(model).parameters())
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=weights.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=weights.device)
    lowest = torch.finfo(weights.dtype).min

    def hide(mask: torch.Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask.to(kwargs["position_embeddings"][0].device)}

    with contextlib.ExitStack() as hooks:
        for stage, (first, survivors) in enumerate(zip(layers, kept, strict=True)):
            visible = torch.zeros(tokens, dtype=torch.bool, device=weights.device)
            visible[survivors] = True
            # A removed query sees itself, or its softmax would have nothing to sum over; no survivor reads its result.
            allowed = causal & visible | itself
            mask = torch.zeros(1, 1, tokens, tokens, dtype=weights.dtype, device=weights.device)
            mask = mask.masked_fill(~allowed, lowest)
            for layer in range(first, (*layers, len(modules))[stage + 1]):
                hook = modules[layer].register_forward_pre_hook(functools.partial(hide, mask), with_kwargs=True)
                hooks.callback(hook.remove)
        yield
