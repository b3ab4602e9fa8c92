"""What decoder layers are handed in place of what the model's loop made for layer 0: masks, rotary tables, biases.

That loop gives every layer the same mask, position ids and rotary table; after the first stage layers run on fewer
tokens, and meet fewer keys, so these are rewritten before each of them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from sdtp.pruning.selection import take


class Slots(Protocol):
    """The tokens whose keys a layer meets, the new ones last."""

    @property
    def seen(self) -> int:
        """Columns of input up to here, removed tokens and padding included."""

    @property
    def columns(self) -> torch.Tensor:
        """LongTensor [batch, slots], each slot's column of the input, never descending."""

    def valid(self) -> torch.Tensor | None:
        """[batch, slots] bool, True at real tokens; None if no slot is padding."""


class LayerInputs:
    """Masks, tables and biases of one forward pass, made once for all layers that share a length.

    Args:
        config: the decoder's config.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._made: dict[tuple[Any, ...], Any] = {}
        self._sources: list[Any] = []  # keeps tables alive, so that no other one gets the same id

    def forget(self) -> None:
        """Drop what was made: the layers from here on have another length."""
        self._made.clear()
        self._sources.clear()

    def arguments(
        self,
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        slots: Slots,
        cache: Cache | None,
        layer: int,
        stage: int,
        window: int | None,
    ) -> dict[str, Any]:
        """A layer's arguments with what depends on the keys it meets: mask, biases, and no position ids.

        Attention kernels read gaps in position ids as borders of packed sequences; positions themselves are in the
        rotary tables, the biases or the states.

        Args:
            kwargs: as the model gave them.
            hidden, slots, cache, layer, stage, window: see `mask`.
        """
        changed = {**kwargs, "attention_mask": self.mask(hidden, slots, cache, layer, stage, window)}
        if "position_ids" in kwargs:
            changed["position_ids"] = None
        if kwargs.get("alibi") is not None:
            changed["alibi"] = self.alibi(kwargs["alibi"], slots, stage)
        return changed

    def mask(
        self, hidden: torch.Tensor, slots: Slots, cache: Cache | None, layer: int, stage: int, window: int | None
    ) -> Any:
        """The attention mask of a layer; None where the kernel needs none.

        Args:
            hidden: [batch, tokens, hidden] states the layer is about to run on.
            slots: the keys they meet, in a sliding layer also those that left it.
            cache: tells, at `layer`, how many keys are held already; None if none are kept.
            layer: decoder layer, for the cache.
            stage: the stage whose survivors the layer holds: layers of one stage and window share a mask.
            window: latest positions the layer attends to, itself included; None for all.

        Raises:
            ValueError: the window hides keys and the kernel would count it in slots (flash attention).
        """
        if window is not None and slots.seen <= window:
            window = None
        key = ("mask", stage, window, hidden.device)
        if key not in self._made and hidden.shape[1] == 1 and self._config._attn_implementation == "sdpa":
            self._made[key] = _lone_query(slots, cache, layer, window, hidden.device)
        elif key not in self._made:
            # Position ids are left out: gaps in them would be read as borders of packed sequences.
            valid = slots.valid()
            self._made[key] = create_causal_mask(
                config=self._config,
                inputs_embeds=hidden,
                attention_mask=valid,
                # To find out whether it could do without one, it would read a mask that is known to hide something.
                allow_is_causal_skip=valid is None,
                cache=cache,
                layer_idx=layer,
                and_mask_function=None if window is None else self._within(window, slots, hidden),
            )
        return self._made[key]

    def _within(self, window: int, slots: Slots, hidden: torch.Tensor) -> Any:
        """True where a key's original position lies within the window of a query's; arguments are slots."""
        check_flash_window(self._config, window, slots.seen)
        columns = slots.columns.to(hidden.device).contiguous()
        queries = columns[:, -hidden.shape[1] :].contiguous()
        # The first slot in reach: columns do not descend, so a comparison of slots does for one of columns.
        first = torch.searchsorted(columns, queries - (window - 1))
        earlier = columns.shape[1] - hidden.shape[1]

        def within(row: Any, head: Any, query: Any, key: Any) -> Any:
            return key >= first[row, query - earlier]

        return within

    def rotary(self, table: Any, columns: torch.Tensor) -> Any:
        """A rotary table [batch or 1, columns, dim], or a tuple of them (cos, sin), cut to the tokens present."""
        key = ("rotary", id(table))
        if key not in self._made:
            self._sources.append(table)
            cut = [take(part, columns.to(part.device)) for part in (table if isinstance(table, tuple) else (table,))]
            self._made[key] = tuple(cut) if isinstance(table, tuple) else cut[0]
        return self._made[key]

    def alibi(self, bias: torch.Tensor, slots: Slots, stage: int) -> torch.Tensor:
        """ALiBi biases [batch * heads, 1, columns] of all keys, cut to those a layer meets."""
        key = ("alibi", stage, bias.device)
        if key not in self._made:
            columns = slots.columns.to(bias.device).clamp_min(0)
            cut = bias.unflatten(0, (columns.shape[0], -1)).squeeze(2).mT  # [batch, columns, heads]
            self._made[key] = take(cut, columns).mT.flatten(0, 1).unsqueeze(1)
        return self._made[key]


def check_flash_window(config: Any, window: int | None, tokens: int) -> None:
    """Raise ValueError if a sequence of so many tokens is longer than a window that a flash kernel counts in slots."""
    if "flash" in config._attn_implementation and window is not None and tokens > window:
        raise ValueError(
            f"{config._attn_implementation} counts a sliding window of {window} in tokens held, removed ones left out: "
            f"a sequence of {tokens} tokens is not supported under a pruner with it, use sdpa"
        )


def _lone_query(
    slots: Slots, cache: Cache | None, layer: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """The mask [batch, 1, 1, keys] of a step of decoding, True at keys to attend to; None if that is all.

    A lone new token is later than every key, so real keys within the window are those it sees. There is one such mask a
    stage and step: the general way costs several times as much, and reads from the device.
    """
    visible = slots.valid()
    if window is not None:
        near = slots.columns > slots.columns[:, -1:] - window
        visible = near if visible is None else visible & near
    if visible is None:
        return None
    keys = visible.shape[1] if cache is None else cache.get_mask_sizes(1, layer)[0]
    return visible[:, None, None, visible.shape[1] - keys :].to(device)
