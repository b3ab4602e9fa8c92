"""A KV cache of which entries were dropped after they were made: heads hold different tokens, at original positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from sdtp.pruning.cache import PrunedLayer


class CompressedLayer(DynamicLayer):
    """A cache layer that holds some of a prompt's entries, another choice in each head, and all tokens after it.

    It says of itself that it has seen the whole prompt, so that the next token gets the position it would get, and that
    the entries it holds are the latest of that: they are earlier than any new token, which is all that a mask asks.

    Args:
        keys: [1, KV heads, entries, head_dim], rotated by their original positions.
        values: likewise.
        seen: tokens of the prompt, dropped ones included.
    """

    is_croppable = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.dropped = seen - keys.shape[-2]

    @property
    def held(self) -> int:
        """Entries of each head, those after the prompt included."""
        length: int = super().get_seq_length()
        return length

    def get_seq_length(self) -> int:
        """Tokens seen so far, dropped ones included: the position of the next."""
        return self.held + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that so many new tokens meet, and the slot of the first of them."""
        return self.held + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens.

        Raises:
            ValueError: always, unless it is 0 tokens.
        """
        if tokens_to_remove != 0:
            raise ValueError(f"crop({tokens_to_remove}): a compressed cache cannot give tokens back")

    def reset(self) -> None:
        """Refuse to forget.

        Raises:
            RuntimeError: always; a compressed layer cannot become a full one in place.
        """
        raise RuntimeError("a compressed cache cannot be reset: make a new cache for a new prompt")


def keep_entries(cache: Cache, columns: list[torch.Tensor], prompt_tokens: int) -> tuple[torch.Tensor, ...]:
    """Drop every entry of a prefilled cache but the given ones, in place.

    Args:
        cache: of one row, unpruned or pruned; after this only a peer's context continues it.
        columns: per layer a LongTensor [KV heads, entries], which of the entries it holds now each head keeps.
        prompt_tokens: tokens of the prompt, those a pruner removed included.

    Returns:
        Per layer LongTensor [KV heads, entries]: which prompt tokens those are.
    """
    positions = []
    for index, chosen in enumerate(columns):
        layer: Any = cache.layers[index]
        rows = chosen[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        values = chosen[None, :, :, None].expand(-1, -1, -1, layer.values.shape[-1])
        positions.append(layer.positions[0].to(chosen.device)[chosen] if isinstance(layer, PrunedLayer) else chosen)
        cache.layers[index] = CompressedLayer(layer.keys.gather(2, rows), layer.values.gather(2, values), prompt_tokens)
    return tuple(positions)
