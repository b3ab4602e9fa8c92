"""What a pruned KV cache knows: the position of every token that each layer holds.

The knowledge lives in the cache's own layers, so it goes where they go: through copying, saving and beam reordering.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer that holds the survivors of a pruned prompt and the tokens after it.

    Every layer of a pruned cache is one, those before the first stage too: layer 0 is the first to be continued, cut or
    reset, so what is refused is refused before any layer has changed.

    Args:
        positions: LongTensor [batch, slots], each survivor's index among its row's real prompt tokens; -1 where the
            slot is padding.
        stage: the stage that chose them; layers of one stage hold the same slots. -1: before any removal.
        prompt_slots: slots taken by the prompt, padding included; `crop` never cuts into them.
        padded: whether any slot is padding.
    """

    def __init__(self, positions: torch.Tensor, stage: int, prompt_slots: int, padded: bool) -> None:
        super().__init__()
        self.stage = stage
        self.prompt_slots = prompt_slots
        self.padded = padded
        self._known = positions
        self._plain = 0  # tokens appended since without padding: counted now, given positions when someone asks
        self._expected = positions.shape[1]

    @property
    def slots(self) -> int:
        """Slots held or announced."""
        return self._known.shape[1] + self._plain

    @property
    def positions(self) -> torch.Tensor:
        """LongTensor [batch, slots], each slot's index among its row's real tokens; -1 where the slot is padding."""
        if self._plain:
            steps = torch.arange(1, self._plain + 1, device=self._known.device)
            self._known = torch.cat([self._known, self._known.amax(1, keepdim=True) + steps], dim=1)
            self._plain = 0
        return self._known

    def expect(self, valid: torch.Tensor | None, tokens: int) -> None:
        """Announce the next `update`: the pruner has prepared a mask of this layer's own length for it.

        Args:
            valid: [batch, tokens] bool, True at real tokens; None if all are.
            tokens: tokens the update will add.
        """
        if valid is None:
            self._plain += tokens
        else:
            new = self.positions.amax(1, keepdim=True) + valid.cumsum(1)
            self._known = torch.cat([self._known, new.masked_fill(~valid, -1)], dim=1)
            self.padded = True
        self._expected = tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, heads, tokens, head_dim]; return all of them.

        Raises:
            RuntimeError: outside a pruner's context, where the model builds one mask for all layers from layer 0's
                length: right for one token and no padding, wrong for anything else.
        """
        tokens = key_states.shape[-2]
        if self._expected != tokens:
            if tokens > 1 or self.padded:
                raise RuntimeError(
                    f"this cache holds a pruned prompt and got {tokens} tokens for {key_states.shape[0]} rows outside "
                    "a pruner's context: layers differ in length there, continue it inside `with pruner(model):`"
                )
            self._plain += tokens
        self._expected = 0
        return super().update(key_states, value_states, *args, **kwargs)

    def adopt(self, plain: DynamicLayer) -> None:
        """Hold what `plain` holds; without any, the first `update` brings it."""
        if plain.keys is not None and plain.values is not None:
            self.lazy_initialization(plain.keys, plain.values)
            self.keys, self.values = plain.keys, plain.values
            self._expected = 0

    def valid(self) -> torch.Tensor | None:
        """[batch, slots] bool, True at real tokens, announced ones included; None if no slot is padding."""
        return self.positions >= 0 if self.padded else None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        super().reorder_cache(beam_idx)
        self._known = self._known.index_select(0, beam_idx.to(self._known.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._known = self._known.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        super().batch_select_indices(indices)
        self._known = self._known[indices, ...]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest `-tokens_to_remove` tokens (a negative number or 0).

        Raises:
            ValueError: the cut would reach into the pruned prompt, whose removed tokens cannot be given back.
        """
        left = self.slots + tokens_to_remove
        if left < self.prompt_slots:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the pruned prompt: only the "
                f"{self.slots - self.prompt_slots} tokens after it can be removed"
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self._known = self.positions[:, :left]

    def reset(self) -> None:
        """Forget everything: the layer then takes tokens as an unpruned one does.

        Raises:
            RuntimeError: always; a pruned layer cannot become an unpruned one in place.
        """
        raise RuntimeError("a pruned cache cannot be reset: make a new cache for a new prompt")


def install(cache: Cache, layer: int, pruned: PrunedLayer) -> None:
    """Put a pruned layer in the place of a dynamic one, taking over the keys and values it holds already.

    Raises:
        TypeError: the cache keeps this layer in another form (static, sliding, quantised, offloaded).
    """
    if cache.offloading:
        raise TypeError(f"{type(cache).__name__} offloads its layers: pruning supports DynamicCache without offloading")
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    plain = cache.layers[layer]
    if type(plain) is not DynamicLayer:
        raise TypeError(
            f"layer {layer} of {type(cache).__name__} is a {type(plain).__name__}: pruning supports DynamicCache with "
            "full attention only"
        )
    pruned.adopt(plain)
    cache.layers[layer] = pruned
