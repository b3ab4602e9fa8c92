"""What a scorer is: what it may look at when a stage decides, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class StageView:
    """What a scorer may look at when a stage decides.

    Attributes:
        stage: 0-based stage.
        layer: the decoder layer the hidden states are about to enter.
        hidden: [batch, tokens, hidden], the states of the tokens still present.
        positions: LongTensor [batch, tokens], each token's index among its row's real prompt tokens (0...N-1); -1 where
            the row is padding.
        prompt_lengths: LongTensor [batch], `N` of each row.
        last_query_attention: computes [batch, tokens] float32, the attention that the last prompt token paid in layer
            `layer - 1`, averaged over heads; under `LastQuery` alone, which has these layers checked and watched.
    """

    stage: int
    layer: int
    hidden: torch.Tensor
    positions: torch.Tensor
    prompt_lengths: torch.Tensor
    last_query_attention: Callable[[], torch.Tensor]


class Scorer(Protocol):
    """Scores the tokens entering a stage; the higher, the more worth keeping."""

    @property
    def question_conditioned(self) -> bool:
        """Whether a token's score depends on what follows it in the prompt.

        Then the survivors of a document are right for the one question it was read with.
        """
        ...

    def score(self, view: StageView) -> torch.Tensor:
        """Scores [batch, tokens], float32; values at padding are ignored."""
        ...
