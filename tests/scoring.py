"""A learned scorer asked about one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdtp.pruning.scorers import Learned


def keep_scores(
    scorer: Learned, stage: int, hidden: torch.Tensor, positions: Sequence[int] | None = None, prompt: int | None = None
) -> torch.Tensor:
    """[tokens] scores of the states [tokens, hidden] of the tokens at `positions` of a prompt of `prompt` tokens.

    All tokens of a prompt without positions; a prompt that ends with the last of them without its length.
    """
    places = torch.arange(len(hidden)) if positions is None else torch.as_tensor(positions)
    lengths = torch.tensor([int(places[-1]) + 1 if prompt is None else prompt])
    scores: torch.Tensor = scorer(stage, hidden[None], places[None], lengths)
    return scores[0]
