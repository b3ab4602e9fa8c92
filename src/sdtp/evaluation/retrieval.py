"""Retrieval: is the planted answer found?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdtp.evaluation.teacher_forcing import Forced


def correct(forced: Forced, response_ids: Sequence[int]) -> bool:
    """Whether every response token is the most likely one, so that greedy decoding writes just that response."""
    return torch.equal(forced.argmax, torch.tensor(list(response_ids)))


def found(prediction: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference occurs in the predicted text, letter case and surrounding blanks aside.

    All of it true is the strict score, the mean the partial one. A reference has to be in the prediction, never the
    other way round: an empty prediction finds nothing.

    Raises:
        ValueError: a blank reference, which every text contains.
    """
    if any(not reference.strip() for reference in references):
        raise ValueError(f"references are {list(references)}: a blank one is in every text")
    text = prediction.casefold()
    return [reference.strip().casefold() in text for reference in references]
