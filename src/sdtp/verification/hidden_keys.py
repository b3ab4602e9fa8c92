"""What a pruned model must give: the unpruned one's logits over all tokens, with removed ones hidden as keys.

Of a pruner this takes the trace alone. Positions, biases and states come from the unpruned graph, and only what each
query may attend to is rewritten.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sdtp.pruning.adapter import architecture, bound_arguments
from sdtp.pruning.wrappers import unwrap


def masked_logits(
    model: nn.Module,
    input_ids: torch.Tensor,
    layers: Sequence[int],
    kept: Sequence[torch.Tensor],
    prompt_columns: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [batch, tokens, vocabulary] of a prompt and what followed it, in one forward without a cache.

    They mean something at tokens that no stage removed, and nothing at padding.

    Args:
        model: a causal LM that a pruner supports. Another kernel than `eager` or `sdpa` is put aside meanwhile: these
            two take any mask.
        input_ids: LongTensor [batch, tokens].
        layers: the stages' decoder layers, ascending.
        kept: a trace: per stage a LongTensor [batch, max_kept] of indices into the row's real prompt tokens, -1 = none.
        prompt_columns: the first columns, padding included, that are prompt.
        attention_mask: [batch, tokens], nonzero at real tokens; None if all are.
        position_ids: LongTensor [batch, tokens], None for each token's index among its row's real ones.
    """
    inputs: dict[str, torch.Tensor] = {}
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
        inputs["attention_mask"] = attention_mask
        if position_ids is None and takes_position_ids(model):
            position_ids = (real.cumsum(1) - 1).clamp_min(0)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    with hidden_keys(model, layers, kept, real, prompt_columns), torch.no_grad():
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, **inputs).logits
    return logits


def takes_position_ids(model: nn.Module) -> bool:
    """Whether callers may say where each token stands; some families read that off the padding mask alone."""
    return "position_ids" in inspect.signature(unwrap(model).forward).parameters


@contextlib.contextmanager
def hidden_keys(
    model: nn.Module, layers: Sequence[int], kept: Sequence[torch.Tensor], real: torch.Tensor, prompt_columns: int
) -> Iterator[None]:
    """Inside, from each stage's layer on, queries see only that stage's survivors among the prompt's keys.

    A query also sees itself: a removed one, whose result no survivor reads, would have nothing to attend to. A sliding
    window reaches as many columns back as in the unpruned model, removed tokens included.

    Args:
        model: a causal LM; forward passes inside take no cache and have the shape of `real`.
        layers, kept, prompt_columns: as for `masked_logits`.
        real: [batch, tokens] bool, True at real tokens.
    """
    inner: Any = unwrap(model)
    parts = architecture(inner)
    columns = torch.arange(real.shape[1], device=real.device)
    distance = columns[:, None] - columns
    keys = [real, *(_survivors(real, stage, prompt_columns) for stage in kept)]  # of no stage, the first, ...

    @functools.cache
    def additive(stage: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        near = (distance >= 0) & (distance < (window or real.shape[1]))
        seen = (near & keys[stage][:, None]) | (distance == 0)  # [batch, queries, keys]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill(~seen.to(device), torch.finfo(dtype).min)[:, None]

    def hide(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(bound_arguments(module, args, kwargs))
        hidden = given.pop("hidden_states")
        stage = bisect.bisect_right(layers, layer)
        given["attention_mask"] = additive(stage, parts.windows[layer], hidden.dtype, hidden.device)
        return (hidden,), given

    implementation = parts.config._attn_implementation
    with contextlib.ExitStack() as undo:
        for layer, module in enumerate(parts.layers):
            hook = module.register_forward_pre_hook(functools.partial(hide, layer), with_kwargs=True)
            undo.callback(hook.remove)
        if implementation not in ("eager", "sdpa"):
            undo.callback(inner.set_attn_implementation, implementation)
            inner.set_attn_implementation("sdpa" if inner._supports_sdpa else "eager")
        yield


def _survivors(real: torch.Tensor, kept: torch.Tensor, prompt_columns: int) -> torch.Tensor:
    """[batch, tokens] bool: a stage's survivors in the prompt, and every real token after it."""
    rows, tokens = real.shape
    seen = torch.zeros(rows, tokens + 1, dtype=torch.bool, device=real.device)  # by position; the last takes all -1
    kept = kept.to(real.device)
    seen.scatter_(1, torch.where(kept < 0, tokens, kept), True)
    positions = (real.cumsum(1) - 1).clamp_min(0)
    survivors = real & seen[:, :tokens].gather(1, positions)
    survivors[:, prompt_columns:] = real[:, prompt_columns:]
    return survivors
