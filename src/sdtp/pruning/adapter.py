"""Where a pruner takes hold of a transformers model, and which models it refuses."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def decoder(model: Any) -> Any:
    """The decoder stack (embedding, layers, final norm) inside a causal LM.

    Raises:
        TypeError: there is none, named with the model's class.
    """
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
        raise TypeError(f"{type(model).__name__} is not supported: it has no decoder with a list of layers")
    return model.get_decoder()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a supported model.

    Supported are decoders whose layers attend to the whole prefix with rotary positions handed to each layer: Llama,
    Qwen2, Qwen3, Mistral without a sliding window, and relatives.

    Raises:
        TypeError: the model is of another kind, with the reason.
    """
    name = type(model).__name__
    stack = decoder(model)
    layers: nn.ModuleList = stack.layers
    config = stack.config
    kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if kinds:
        raise TypeError(f"{name} is not supported: it has layers of type {', '.join(kinds)}, only full attention is")
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise TypeError(f"{name} is not supported with sliding_window={config.sliding_window}: only full attention is")
    for layer in layers:
        if "position_embeddings" not in inspect.signature(layer.forward).parameters:
            raise TypeError(f"{name} is not supported: its layers take no rotary position_embeddings")
        attention: Any = getattr(layer, "self_attn", None)
        if not hasattr(attention, "q_proj"):
            raise TypeError(f"{name} is not supported: its layers have no self_attn with a q_proj")
        if not getattr(attention, "use_rope", True):
            raise TypeError(f"{name} is not supported: some of its layers have no rotary positions")
        position_ids = inspect.signature(attention.forward).parameters.get("position_ids")
        if position_ids is not None and position_ids.default is inspect.Parameter.empty:
            raise TypeError(f"{name} is not supported: its attention computes with position_ids")
    return layers
