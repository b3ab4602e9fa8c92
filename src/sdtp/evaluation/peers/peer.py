"""The interface of every peer: something that prefills a prompt and leaves a cache to go on with."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from sdtp.evaluation.peers.attaching import PlainModel, attached, plain
from sdtp.evaluation.peers.trace import Held, Prefilled
from sdtp.pruning.adapter import Architecture


class Peer(abc.ABC):
    """A way of prefilling a prompt that leaves fewer tokens in the cache than it has.

    Used as a `TokenPruner` is, one row at a time; a peer sees to `prefill` and inherits the rest.

    Examples:
        >>> with GemFilter(layer=13, keep=fraction(0.1))(model) as held:
        ...     out = model.generate(input_ids, max_new_tokens=128)
        >>> held.entries  # prompt tokens in each layer's cache
    """

    @abc.abstractmethod
    def check(self, architecture: Architecture) -> None:
        """Raise TypeError or ValueError, with the reason, if the peer does not work with a model."""

    @abc.abstractmethod
    def prefill(self, model: PlainModel, input_ids: torch.Tensor, cache: DynamicCache) -> Prefilled:
        """Prefill a prompt.

        Args:
            model: without this peer.
            input_ids: LongTensor [1, N], N >= 1.
            cache: empty; filled in place. Its `get_seq_length` is then the position of the next token.
        """

    @abc.abstractmethod
    def prefill_flops(self, config: Any, prompt_tokens: int) -> float:
        """Operations of `prefill` on a prompt of N tokens, what the peer scores by included; see `sdtp.pruning.flops`.

        Args:
            config: a transformers config of a decoder; see `flops.Dimensions.of` for what is refused.
            prompt_tokens: `N` >= 1.
        """

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Held]:
        """Prefill every prompt that `model` is given inside the context this way; the model is as before on exit.

        A forward with no cache or an empty one is a prompt: one row without padding. Its output has the logits of the
        last position alone. A forward on the cache that it returns continues it. So does `generate`, which is refused
        where its first forward is not the prompt. Not for several threads at once.

        Args:
            model: a causal LM of transformers with rotary positions, full attention and the kernel sdpa or eager, also
                inside PEFT or DistributedDataParallel.

        Yields:
            What the latest prefill left in the cache.

        Raises:
            TypeError: the model's kind is not supported.
            ValueError: its attention kernel or its number of layers is not, or a peer is attached.
        """
        found = plain(model)
        self.check(found.architecture)
        with attached(found, self.prefill) as held:
            yield held
