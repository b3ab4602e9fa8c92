"""What a prefill under a peer left in the cache, and what it hands back."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A prompt's prefill; its keys and values are in the cache that it was given.

    Attributes:
        logits: [1, 1, vocabulary] of the token after the prompt.
        positions: per layer a LongTensor [KV heads or 1, entries], the prompt tokens whose keys and values each KV head
            holds, ascending; one row where all heads hold the same.
    """

    logits: torch.Tensor
    positions: tuple[torch.Tensor, ...]


@dataclasses.dataclass
class Held:
    """What the latest prefill under a peer left in the cache.

    Attributes:
        prompt_tokens: `N` of the prompt; 0 before any.
        positions: see `Prefilled.positions`: indices into the prompt, 0...N-1, whatever positions they are rotated by.
    """

    prompt_tokens: int = 0
    positions: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @property
    def entries(self) -> list[int]:
        """Prompt tokens that each layer holds, per KV head."""
        return [positions.shape[1] for positions in self.positions]

    @property
    def kept(self) -> list[torch.Tensor]:
        """Per layer a LongTensor [1, tokens], the prompt tokens that at least one KV head holds, ascending.

        In the form of a pruner's `Trace.kept`, which has one per stage. Heads that differ hold more tokens together
        than `entries`.
        """
        return [positions.unique()[None] for positions in self.positions]
