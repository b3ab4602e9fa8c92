"""Independent slow paths: removed tokens hidden as keys, decoding over keys kept by hand, removal layer by layer.

Imports nothing of sdtp but the schedule.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from sdtp.pruning.schedule import PruningSchedule

# Changes what a layer is called with: given the layer's index and its arguments by name, the arguments to replace.
Rewrite = Callable[[int, Mapping[str, Any]], Mapping[str, Any]]


class Float64Throughout(TorchFunctionMode):
    """Reads every float32 as float64 while active, so that a float64 model computes in float64 throughout.

    Modelling code takes norms, rotary tables, ALiBi slopes and eager softmaxes in float32 whatever the model's dtype,
    and `generate` hands out logits in float32. Two equal computations then differ by float32's rounding: 1e-8 for the
    families that have the eager kernel alone, where softmaxes over more hidden keys add up in another order.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with float64 in place of float32."""
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM, wherever its family keeps them."""
    modules = dict(model.named_modules())
    paths = ("model.layers", "model.decoder.layers", "gpt_neox.layers", "transformer.h")
    return next(modules[path] for path in paths if path in modules)


def windows(model: PreTrainedModel) -> list[int | None]:
    """Each layer's sliding window: a query sees the keys less than this many columns before it. None: all of them."""
    window = getattr(model.config, "sliding_window", None)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * len(decoder_layers(model))
    return [window if kind == "sliding_attention" else None for kind in types]


@contextlib.contextmanager
def rewritten(model: PreTrainedModel, rewrite: Rewrite) -> Iterator[None]:
    """The unpruned model with what its layers are called with rewritten; in sdpa where the family has it.

    In eager attention a float64 model takes its softmax in float32, sdpa in float64.
    """

    def before(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            given.arguments.update(rewrite(layer, given.arguments))
            return given.args, given.kwargs

        return hook

    handles = [
        module.register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer, module in enumerate(decoder_layers(model))
    ]
    implementation = model.config._attn_implementation
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(implementation)
        for handle in handles:
            handle.remove()


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Attention mask [batch, 1, queries, keys] to add to scores, of a bool [batch, queries, keys]: True = visible."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def visible_keys(
    model: PreTrainedModel, real: torch.Tensor, layers: tuple[int, ...], kept: list[torch.Tensor], prompt: int
) -> list[torch.Tensor]:
    """Per layer the keys each query may see, bool [batch, tokens, tokens]; arguments as of `masked_logits`.

    A window counts columns, as the unpruned model does: removed tokens and padding between two turns take their room.
    Every token sees itself, so that no softmax is over nothing: that changes padding and removed tokens only, whose
    states nobody sees.
    """
    columns = torch.arange(real.shape[1])
    distance = columns[:, None] - columns
    positions = (real.cumsum(1) - 1).clamp_min(0)
    masks = []
    for layer, window in enumerate(windows(model)):
        keys = real.bool().clone()
        for stage, start in enumerate(layers):
            if layer >= start:
                for row, survivors in enumerate(kept[stage]):
                    keys[row, :prompt] &= torch.isin(positions[row, :prompt], survivors)
        near = (distance >= 0) & (distance < (window or len(columns)))
        masks.append((near & keys[:, None, :]) | (distance == 0))
    return masks


def logits_under_masks(
    model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, masks: list[torch.Tensor]
) -> torch.Tensor:
    """Logits [batch, tokens, vocabulary] of the unpruned model whose layer `l` attends by `masks[l]`.

    The model itself is given the padding mask [batch, tokens], from which families with ALiBi or learned positions read
    positions; only the layers see the others.
    """
    inputs = {"input_ids": ids, "attention_mask": real, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
    with rewritten(model, lambda layer, _: {"attention_mask": additive(masks[layer], model.dtype)}):
        return model(**inputs).logits


def masked_logits(
    model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, layers: tuple[int, ...], kept: list[torch.Tensor],
    prompt: int,
) -> torch.Tensor:  # fmt: skip
    """Logits [batch, tokens, vocabulary] of a forward over all tokens in which removed ones are hidden as keys.

    `ids` [batch, tokens] holds the padded prompt (its first `prompt` columns) and what followed; `real` [batch, tokens]
    is 1 at real tokens; `kept` is a trace: per stage [batch, max_kept] indices into the row's real prompt tokens,
    -1 = none.
    """
    return logits_under_masks(model, ids, real, visible_keys(model, real, layers, kept, prompt))


def stepwise_logits(
    model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, layers: tuple[int, ...], kept: list[torch.Tensor],
    prompt: int,
) -> torch.Tensor:  # fmt: skip
    """Logits at the last prompt token and at every token after it, decoded one at a time over keys kept by hand.

    Arguments as of `masked_logits`. Each row runs alone and without its padding (windows alone know of it): a forward
    over its prompt with removed keys hidden, each layer's cache cut to its survivors, then token by token with that
    layer's mask and ALiBi.

    Returns:
        [batch, 1 + tokens - prompt, vocabulary]; NaN at padding.
    """
    rows = [
        _stepwise_row(model, ids[row], real[row].bool(), layers, [k[row][k[row] >= 0].tolist() for k in kept], prompt)
        for row in range(ids.shape[0])
    ]
    return torch.stack(rows)


def _stepwise_row(
    model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, layers: tuple[int, ...], kept: list[list[int]],
    prompt: int,
) -> torch.Tensor:  # fmt: skip
    columns = real.nonzero()[:, 0].tolist()  # of the row's tokens, by position
    length = sum(column < prompt for column in columns)
    window = [size or len(real) for size in windows(model)]
    held = [list(range(length)) for _ in window]  # the positions of each layer's keys
    for survivors, start in zip(kept, layers, strict=True):
        for layer in range(start, len(held)):
            held[layer] = list(survivors)
    queries, decoding = list(range(length)), False

    def rewrite(layer: int, given: Mapping[str, Any]) -> Mapping[str, Any]:
        # In the prompt every token is still a key, and removed ones are hidden; later the cache holds what is held.
        keys = held[layer] if decoding else queries
        seen = set(held[layer])
        allowed = [
            [k == q or (k < q and k in seen and columns[q] - columns[k] < window[layer]) for k in keys] for q in queries
        ]
        changed = {"attention_mask": additive(torch.tensor(allowed)[None], model.dtype)}
        if "alibi" in given:
            changed["alibi"] = given["alibi"][..., keys]  # the model's is for every position, as layer 0 holds them
        return changed

    def step() -> torch.Tensor:
        inputs = {"input_ids": ids[columns][queries][None], "cache": cache, "use_cache": True}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = torch.tensor([queries])
        return model(**inputs).logits[0, -1]

    cache = DynamicCache()  # without a config: sliding layers keep everything
    with rewritten(model, rewrite):
        logits = torch.full((1 + len(ids) - prompt, model.config.vocab_size), torch.nan, dtype=model.dtype)
        logits[0] = step()
        for layer, positions in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = layer.keys[:, :, positions], layer.values[:, :, positions]
        decoding = True
        for position in range(length, len(columns)):
            queries = [position]
            for positions in held:
                positions.append(position)
            logits[1 + columns[position] - prompt] = step()
    return logits


def removal(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    prompt_tokens: int,
    schedule: PruningSchedule,
    score: Callable[[int, torch.Tensor, list[int]], torch.Tensor],
) -> tuple[torch.Tensor, list[list[int]], list[tuple[list[int], torch.Tensor]]]:
    """The meaning of pruning, layer by layer on gathered states: survivors keep position and order.

    Args:
        input_ids: [1, tokens] without padding, of which the first `prompt_tokens` are prompt.
        score: given a stage, the states [present, hidden] of the prompt tokens still present and their positions in
            the prompt, their scores [present].

    Returns:
        The normed states [survivors + rest, hidden] after the last layer, each stage's survivors, and what each stage
        saw: positions and states.
    """
    backbone = model.model
    hidden = backbone.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])
    prompt = list(range(prompt_tokens))
    counts = schedule.surviving(prompt_tokens)
    entering: list[tuple[list[int], torch.Tensor]] = []
    kept: list[list[int]] = []
    for index, layer in enumerate(backbone.layers):
        if index in schedule.layers:
            stage = schedule.layers.index(index)
            n = len(prompt)
            tail = schedule.protected_tail(n)
            values = score(stage, hidden[0, :n], prompt)
            entering.append((list(prompt), hidden[0, :n]))
            forced = [i for i in range(n) if prompt[i] < schedule.sinks or i >= n - tail]
            free = sorted((i for i in range(n) if i not in forced), key=lambda i: (-values[i].item(), i))
            chosen = sorted(forced + free[: counts[stage] - len(forced)])
            columns = torch.tensor(chosen + list(range(n, hidden.shape[1])))
            hidden, positions = hidden[:, columns], positions[columns]
            prompt = [prompt[i] for i in chosen]
            kept.append(prompt)
        length = hidden.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
        rope = backbone.rotary_emb(hidden, position_ids=positions[None])
        hidden = layer(hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=rope)
    return backbone.norm(hidden)[0], kept, entering
