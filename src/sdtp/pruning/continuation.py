"""A forward pass over tokens that come after a pruned prompt: decoding, candidates, later turns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import Cache

from sdtp.pruning.adapter import Architecture
from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.layer_inputs import LayerInputs


@dataclasses.dataclass(frozen=True)
class MaskedSlots:
    """`Slots` of a cache layer, of which the caller's mask may hide more than padding.

    Attributes:
        held: the layer.
        mask: [batch, columns of input up to here] bool, True at tokens to attend to.
    """

    held: PrunedLayer
    mask: torch.Tensor

    @property
    def seen(self) -> int:
        """See `Slots.seen`."""
        return self.held.seen

    @property
    def columns(self) -> torch.Tensor:
        """See `Slots.columns`."""
        return self.held.columns

    def valid(self) -> torch.Tensor:
        """See `Slots.valid`."""
        positions, columns = self.held.positions, self.held.columns
        return (positions >= 0) & self.mask.to(columns.device).gather(1, columns.clamp_min(0))


class Continuation:
    """Tokens after a pruned prompt: nothing is removed, each layer gets a mask of its own length.

    Args:
        architecture: the model's layers and how they attend.
        attention_mask: [batch, all tokens] as given to the model, or None.
        shape: (batch, new tokens) of the forward.
    """

    def __init__(self, architecture: Architecture, attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> None:
        self.architecture = architecture
        self.inputs = LayerInputs(architecture.config)
        self.tokens = shape[1]
        self.mask: torch.Tensor | None = None  # [batch, all tokens] bool, if it hides any
        self.new_valid: torch.Tensor | None = None  # its part of the new tokens, if it hides any of these
        if attention_mask is not None:
            mask = attention_mask != 0
            new = mask[:, -self.tokens :]
            whole, new_whole = torch.stack([mask.all(), new.all()]).tolist()
            self.mask, self.new_valid = None if whole else mask, None if new_whole else new

    def adapt(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any], cache: Cache) -> dict[str, Any]:
        """A layer's arguments, with a mask of its own length where its cache holds survivors."""
        held = cache.layers[layer] if layer < len(cache.layers) else None
        if not isinstance(held, PrunedLayer):
            return kwargs
        held.expect(self.new_valid, self.tokens)
        if held.stage < 0:  # the model's own mask, made for layer 0's length, is right
            return kwargs
        slots = held if self.mask is None else MaskedSlots(held, self.mask)
        window = self.architecture.windows[layer]
        return self.inputs.arguments(kwargs, hidden, slots, cache, layer, held.stage, window)
