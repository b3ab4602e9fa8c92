"""A layer of a KV cache around another one: what it leaves to that one."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class WrappedLayer(CacheLayerMixin):
    """A cache layer whose keys and values another one holds.

    What transformers declares as attributes is never set on this layer.

    Attributes:
        held: the other: a dynamic, sliding or quantised layer of transformers.
    """

    held: DynamicLayer

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """[batch, heads, slots, head_dim], of a sliding layer the latest, of a quantised one the unquantised ones."""
        return self.held.keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """As `keys`."""
        return self.held.values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether keys have been held."""
        return self.held.is_initialized

    @property
    def is_sliding(self) -> bool:
        """Whether only a window is held."""
        return self.held.is_sliding

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens after the prompt can be taken back."""
        return self.held.is_croppable

    @property
    def record_past(self) -> bool:
        """Whether a sliding layer holds on to what left its window until `crop` is called."""
        return getattr(self.held, "record_past", False)

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if isinstance(self.held, DynamicSlidingWindowLayer):
            self.held.record_past = value

    def activate_past_recording(self) -> None:
        """Have a sliding layer hold on to what leaves its window until `crop` is called."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Prepare the held layer for keys and values of this kind."""
        self.held.lazy_initialization(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `query_length` new tokens meet, and the slot of the first of them."""
        sizes: tuple[int, int] = self.held.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Slots filled so far, those that left a sliding layer's window included."""
        length: int = self.held.get_seq_length()
        return length

    def get_max_length(self) -> int:
        """The most that the held layer takes, -1 for no limit."""
        length: int = self.held.get_max_length()
        return length

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.held.offload()

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        self.held.prefetch()
