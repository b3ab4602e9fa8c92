"""Where a pruner takes hold of a transformers model, and which models it refuses.

One description serves every family. Models differ in where their layers are, how these learn positions (rotary tables
or ALiBi biases handed to each layer, or embeddings added below the first) and which of them attend within a window.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

# Names under which families keep their decoder layers, a layer its attention, and a layer's forward its cache.
_LAYER_LISTS = ("layers", "h")
_ATTENTIONS = ("self_attn", "attention", "self_attention", "attn")
CACHE_NAMES = ("cache", "layer_past", "past_key_values")
# What a layer may be handed: each is either of no account for which tokens are present, or rewritten for them.
_LAYER_ARGUMENTS = frozenset((
    "hidden_states", "attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "position_embeddings", "alibi",
    "output_attentions", "output_router_logits", "kwargs",
))  # fmt: skip
# Modules of a decoder stack that add embeddings of positions to the tokens', once, below the first layer.
_POSITION_EMBEDDINGS = ("embed_positions", "wpe")

# What no look at the modules shows.
_FIXED_LENGTH = "its decoder gives the last states the length of the prompt"
_REFUSED_TYPES = {
    "gpt2": _FIXED_LENGTH,
    "gpt_bigcode": _FIXED_LENGTH,
    "doge": "its attention makes masks of its own, from all keys held",
    "gpt_neo": "its local attention counts the keys held, not positions",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The parts of a decoder that pruning deals with.

    Attributes:
        stack: embedding, layers and final norm.
        config: the stack's.
        layers: the decoder layers.
        windows: per layer the number of latest positions it attends to, itself included; None for all.
    """

    stack: nn.Module
    config: Any
    layers: nn.ModuleList
    windows: tuple[int | None, ...]

    @functools.cached_property
    def window(self) -> int | None:
        """The smallest of the windows; None if there is none."""
        return min((window for window in self.windows if window is not None), default=None)

    @functools.cached_property
    def alibi(self) -> bool:
        """Whether layers may be handed ALiBi biases of their keys."""
        return "alibi" in _forward_parameters(self.layers[0])

    @property
    def maskless(self) -> bool:
        """Whether a lone new token of an unpadded row needs no mask and no biases, however many keys it meets."""
        return self.config._attn_implementation == "sdpa" and not self.alibi


def decoder(model: Any) -> Any:
    """The decoder stack (embedding, layers, final norm) inside a causal LM.

    Raises:
        TypeError: there is none, named with the model's class.
    """
    stacks = [model.get_decoder() if hasattr(model, "get_decoder") else None, getattr(model, "model", None)]
    for stack in stacks:
        if any(isinstance(getattr(stack, name, None), nn.ModuleList) for name in _LAYER_LISTS):
            return stack
    raise TypeError(f"{type(model).__name__} is not supported: it has no decoder with a list of layers")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a supported model, see `architecture`."""
    return architecture(model).layers


def architecture(model: nn.Module) -> Architecture:
    """What pruning needs to know of a model.

    Supported are decoders whose layers attend to the whole prefix or to a window of it, with rotary or ALiBi positions
    handed to each layer or embeddings of positions added below the first.

    Raises:
        TypeError: the model is of another kind, with the reason.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    for part in ("vision_config", "audio_config", "image_token_id", "num_codebooks"):
        if getattr(config, part, None) is not None:
            raise TypeError(f"{name} is not supported: its prompts are not text alone ({part} is set)")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise TypeError(f"{name} is not supported: it attends to an encoder")
    stack = decoder(model)
    layers: nn.ModuleList = next(getattr(stack, key) for key in _LAYER_LISTS if hasattr(stack, key))
    reasons = (_layer_reason(index, layer) for index, layer in enumerate(layers))
    reason = _reason_to_refuse(stack.config) or next(filter(None, reasons), None)
    if reason is not None:
        raise TypeError(f"{name} is not supported: {reason}")
    takes = [_forward_parameters(layer) for layer in layers]
    handed = all("alibi" in names or "position_embeddings" in names for names in takes)
    if not handed and not any(isinstance(getattr(stack, key, None), nn.Module) for key in _POSITION_EMBEDDINGS):
        raise TypeError(
            f"{name} is not supported: its layers take no rotary position_embeddings and no alibi, and its decoder "
            "adds no embedding of positions"
        )
    windows = tuple(kind.get("sliding_window") for kind in get_layer_types_and_kwargs(stack.config)[1])
    return Architecture(stack, stack.config, layers, windows)


def _reason_to_refuse(config: Any) -> str | None:
    """Why a decoder of this config is not supported."""
    if config.model_type in _REFUSED_TYPES:
        return _REFUSED_TYPES[config.model_type]
    if any(getattr(config, "kv_sharing_modes", None) or ()) or (getattr(config, "num_kv_shared_layers", None) or 0) > 0:
        return "some of its layers read the keys and values of others (KV sharing)"
    if (getattr(config, "n_recurrent_loops", None) or 1) > 1:
        return "it runs some of its layers several times over"
    if getattr(config, "alibi", False):
        return "its ALiBi biases are part of its attention mask"
    kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}, only full and sliding attention are"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "its attention is bidirectional"
    return None


def attention_of(layer: nn.Module) -> nn.Module | None:
    """A decoder layer's attention; None if it has none."""
    found = (getattr(layer, name, None) for name in _ATTENTIONS)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _layer_reason(index: int, layer: nn.Module) -> str | None:
    """Why a decoder layer is not supported."""
    modules = list(layer.modules())
    if any(isinstance(module, nn.Conv1d) for module in modules):
        return "some of its layers are recurrent or convolutional"
    attention = attention_of(layer)
    if attention is None:
        return "some of its layers have no attention"
    if {getattr(module, "layer_idx", index) for module in modules} - {index, None}:
        return f"its layer {index} keeps keys and values under another number"
    arguments = _forward_parameters(layer)
    unknown = [name for name in arguments if name not in _LAYER_ARGUMENTS]
    if unknown:
        return f"its layers take {', '.join(unknown)}, which pruning does not know how to give them"
    if not set(CACHE_NAMES) & set(arguments):
        return "its layers take no KV cache"
    position_ids = _forward_parameters(attention).get("position_ids")
    if position_ids is not None and position_ids.default is inspect.Parameter.empty:
        return "its attention computes with position_ids"
    return None


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among a forward's arguments, under any of its names; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, whichever way they were passed."""
    if not args:
        return kwargs
    return {**dict(zip(_forward_parameters(module), args, strict=False)), **kwargs}


def _forward_parameters(module: Any) -> Mapping[str, inspect.Parameter]:
    """What a module's forward takes; one that stands in for it, as on several devices, takes what it wraps."""
    forward = inspect.unwrap(module.forward, stop=inspect.ismethod)
    return _parameters(forward.__func__) if inspect.ismethod(forward) else inspect.signature(forward).parameters


@functools.cache
def _parameters(method: Any) -> dict[str, inspect.Parameter]:
    """Of a class's method, without `self`: asked for at every layer of every step, and slow to find out."""
    return dict(list(inspect.signature(method).parameters.items())[1:])


def tensor_parallel_group(model: nn.Module) -> Any:
    """The process group over which `tp_plan` splits the model's weights; None if they are whole."""
    mesh = getattr(model, "_device_mesh", None) if getattr(model, "_tp_size", None) else None
    if mesh is None or not torch.distributed.is_initialized():
        return None
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()
