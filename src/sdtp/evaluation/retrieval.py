"""Retrieval: is the planted answer found?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdtp.evaluation.teacher_forcing import Forced


def correct(forced: Forced, response_ids: Sequence[int]) -> bool:
    """Whether every response token is the most likely one, so that greedy decoding writes just that response."""
    return torch.equal(forced.argmax, torch.tensor(list(response_ids)))
