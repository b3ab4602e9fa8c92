"""What a pruned KV cache knows: the position of every token that each layer holds.

The knowledge lives in the cache's own layers, so it goes where they go: through copying, saving and beam reordering.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from sdtp.pruning.wrapped_layer import WrappedLayer

_INTERRUPTED = "a forward pass on this cache was interrupted: its layers hold different tokens, make a new cache"


class PrunedLayer(WrappedLayer):
    """A cache layer around another one that holds the survivors of a pruned prompt and the tokens after it.

    Every layer of a pruned cache is one, those before the first stage too: layer 0 is the first to be continued, cut or
    reset, and looks after all of them, so what is refused is refused before any layer has changed. It alone knows the
    others: layers that knew each other would keep a cache's tensors until Python's garbage collector finds the cycle.

    Args:
        held: where the keys and values are: a dynamic, sliding or quantised layer of transformers.
        positions: LongTensor [batch, slots], each survivor's index among its row's real prompt tokens; -1 where the
            slot is padding.
        columns: LongTensor [batch, slots], each survivor's column of the input, ascending where it is not padding.
        stage: the stage that chose them; layers of one stage hold the same slots. -1: before any removal.
        prompt_slots: slots taken by the prompt, padding included; `crop` never cuts into them.
        padded: whether any slot is padding.
        seen: columns of input up to here, removed tokens and padding included.
        window: the fewest latest positions that a layer of the model attends to; None if all attend to all.
        maskless: a lone new token of an unpadded row needs no mask and no other preparation: then a model without a
            pruner can continue the cache.

    Attributes:
        later: of layer 0 the other layers of the cache, see `know_later`; of those none.
    """

    def __init__(
        self,
        held: DynamicLayer,
        positions: torch.Tensor,
        columns: torch.Tensor,
        stage: int,
        prompt_slots: int,
        padded: bool,
        seen: int,
        window: int | None,
        maskless: bool,
    ) -> None:
        self.held = held
        self.later: list[Any] = []
        self.stage = stage
        self.prompt_slots = prompt_slots
        self.padded = padded
        self.seen = seen
        self.window = window
        self.maskless = maskless
        self._positions = positions
        self._columns = columns
        self._plain = 0  # tokens appended since without padding: counted now, given positions when someone asks
        self._expected = positions.shape[1] - held.get_seq_length()

    @property
    def awaits(self) -> bool:
        """Whether tokens were announced that have not come."""
        return self._expected != 0

    def spoil(self) -> None:
        """Have the cache be refused from now on, as one whose forward pass was interrupted."""
        self._expected = -1  # tokens never come in this number

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._positions.shape[0]

    @property
    def slots(self) -> int:
        """Slots announced so far, those that left a sliding layer's window included."""
        return self._positions.shape[1] + self._plain

    @property
    def positions(self) -> torch.Tensor:
        """LongTensor [batch, slots], each slot's index among its row's real tokens; -1 where the slot is padding."""
        self._place_plain()
        return self._positions

    @property
    def columns(self) -> torch.Tensor:
        """LongTensor [batch, slots], each slot's column of the input; -1 where a prompt's slot is padding."""
        self._place_plain()
        return self._columns

    def _place_plain(self) -> None:
        if self._plain:
            steps = torch.arange(1, self._plain + 1, device=self._positions.device)
            self._place(self._positions.amax(1, keepdim=True) + steps, self.seen)
            self._plain = 0

    def _place(self, positions: torch.Tensor, seen: int) -> None:
        """Take up positions [batch, tokens] of the latest tokens, the last of which is in column `seen - 1`."""
        columns = torch.arange(seen - positions.shape[1], seen, device=positions.device).expand_as(positions)
        self._positions = torch.cat([self._positions, positions], dim=1)
        self._columns = torch.cat([self._columns, columns], dim=1)

    def expect(self, valid: torch.Tensor | None, tokens: int) -> None:
        """Announce the next `update`: the pruner prepares the layer's mask and the like for it.

        Args:
            valid: [batch, tokens] bool, True at real tokens, on any device; None if all are.
            tokens: tokens the update will add.
        """
        if valid is None:
            self._plain += tokens
        else:
            valid = valid.to(self._positions.device)
            new = self.positions.amax(1, keepdim=True) + valid.cumsum(1)
            self._place(new.masked_fill(~valid, -1), self.seen + tokens)
            self.padded = True
        self.seen += tokens
        self._expected = tokens

    def valid(self) -> torch.Tensor | None:
        """[batch, slots] bool, True at real tokens, announced ones included; None if no slot is padding."""
        return self.positions >= 0 if self.padded else None

    def takes_unprepared(self, tokens: int) -> bool:
        """Whether the model, left to itself, hands so many new tokens to this layer, and those after it, as it should.

        What the caller's own mask hides is not known here.
        """
        # A window as long as the keys gets a mask that hides none of them.
        within = self.window is None or self.seen + tokens < self.window
        # Rows as long as each other have no padding at first, and some where protected tokens made them differ.
        padded = self.padded or any(isinstance(layer, PrunedLayer) and layer.padded for layer in self.later)
        return tokens == 1 and self.maskless and within and not padded

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, heads, tokens, head_dim]; return those that the new tokens may attend to.

        Raises:
            RuntimeError: outside a pruner's context, where the model builds one mask for all layers from layer 0's
                length: right for one token where no mask is needed, wrong for anything else.
        """
        tokens = key_states.shape[-2]
        if self._expected != tokens:
            if not self.takes_unprepared(tokens):
                raise RuntimeError(
                    f"this cache holds a pruned prompt and got {tokens} tokens for {key_states.shape[0]} rows outside "
                    "a pruner's context: layers differ in length there, continue it inside `with pruner(model):`"
                )
            check_whole([self, *self.later])
            self._plain += tokens
            self.seen += tokens
        self._expected = 0
        both: tuple[torch.Tensor, torch.Tensor] = self.held.update(key_states, value_states, *args, **kwargs)
        return both

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest `-tokens_to_remove` tokens (a negative number or 0).

        Raises:
            ValueError: the cut would reach into the pruned prompt, whose removed tokens cannot be given back, or a
                layer does not hold what the cut would bring back.
        """
        for layer in (self, *self.later):
            layer.check_crop(tokens_to_remove)
        self.held.crop(tokens_to_remove)
        if tokens_to_remove < 0:
            left = self.slots + tokens_to_remove
            self._positions, self._columns = self.positions[:, :left], self.columns[:, :left]
            self.seen += tokens_to_remove

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): the number of latest tokens to remove is negative, or 0")
        left = self.slots + tokens_to_remove
        if left < self.prompt_slots:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the pruned prompt: only the "
                f"{self.slots - self.prompt_slots} tokens after it can be removed"
            )
        if tokens_to_remove == 0:
            return
        if not self.held.is_croppable:
            raise ValueError(f"crop({tokens_to_remove}): a {type(self.held).__name__} cannot give tokens back")
        if isinstance(self.held, DynamicSlidingWindowLayer) and self.held.keys is not None:
            needed = min(self.held.sliding_window - 1, left)
            if self.held.keys.shape[-2] + tokens_to_remove < needed:
                raise ValueError(
                    f"crop({tokens_to_remove}): a sliding layer no longer holds the tokens that would come back into "
                    "its window; call activate_past_recording on the cache before the tokens that may be removed"
                )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self.held.reorder_cache(beam_idx)
        self._positions = self._positions.index_select(0, beam_idx.to(self._positions.device))
        self._columns = self._columns.index_select(0, beam_idx.to(self._columns.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.held.batch_repeat_interleave(repeats)
        self._positions = self._positions.repeat_interleave(repeats, dim=0)
        self._columns = self._columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        self.held.batch_select_indices(indices)
        self._positions = self._positions[indices.to(self._positions.device), ...]
        self._columns = self._columns[indices.to(self._columns.device), ...]
        self.padded = self.padded and bool((self.positions < 0).any())

    def reset(self) -> None:
        """Forget everything: the layer then takes tokens as an unpruned one does.

        Raises:
            RuntimeError: always; a pruned layer cannot become an unpruned one in place.
        """
        raise RuntimeError("a pruned cache cannot be reset: make a new cache for a new prompt")


def check_cache(cache: Any, layers: int) -> None:
    """Refuse a cache that pruning cannot fill or continue.

    Args:
        cache: what a forward was given.
        layers: decoder layers of the model.

    Raises:
        TypeError: it is no cache of transformers, or a layer keeps tokens in another form (static, linear).
        RuntimeError: a forward pass on it was interrupted.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(f"a {type(cache).__name__} is not supported under a pruner: use a DynamicCache")
    kinds = [type(layer) for layer in cache.layers]
    if cache.layer_class_to_replicate is not None:
        kinds.append(cache.layer_class_to_replicate)
    for index, kind in enumerate(kinds):
        if kind not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer) and not issubclass(
            kind, BaseQuantizedLayer
        ):
            raise TypeError(
                f"layer {index} of {type(cache).__name__} is a {kind.__name__}: pruning supports dynamic, sliding, "
                "quantised and offloaded caches"
            )
    check_whole(cache.layers)
    held = {layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)}
    if len(held) > 1 or (any(held) and len(cache.layers) < layers):
        raise RuntimeError(_INTERRUPTED)


def know_later(layers: list[Any]) -> None:
    """Have layer 0 of a pruned cache know those after it, once they are what they are to be."""
    layers[0].later = layers[1:]


def check_whole(layers: list[Any]) -> None:
    """Raise RuntimeError if layers of a pruned cache hold different tokens: a forward pass was interrupted."""
    pruned = [layer for layer in layers if isinstance(layer, PrunedLayer)]
    if pruned and (len(pruned) < len(layers) or any(p.seen != pruned[0].seen or p.awaits for p in pruned)):
        raise RuntimeError(_INTERRUPTED)


def layer_to_hold(cache: Cache, layer: int, layers: int) -> DynamicLayer:
    """A cache's own layer; one that makes its layers as they are needed makes all `layers` of the model here.

    Raises:
        TypeError: it is of another kind than `check_cache` accepts, or knows of a pruned prompt already.
    """
    while len(cache.layers) < layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[layer]
    if not isinstance(held, DynamicLayer):
        raise TypeError(f"layer {layer} of {type(cache).__name__} is a {type(held).__name__}: it cannot hold survivors")
    return held
