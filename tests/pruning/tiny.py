"""What the tests of generating, of conversations and of caches have in common."""

from __future__ import annotations

import contextlib
import inspect

import torch

from sdtp import PruningSchedule
from tests.pruning.reference import Float64Throughout

TOLERANCE = 1e-9


def schedule_for(family):
    """Two stages; Gemma 3 has both kinds of layer before, between and after them."""
    return PruningSchedule((2, 4) if family == "gemma3" else (1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)


def prompt(*lengths):
    """Token ids (0 at padding) and mask of left-padded rows with the given numbers of real tokens."""
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    real = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        real[row, max(lengths) - n :] = 1
    return ids * real, real


def positions_of(model, real):
    """The argument `position_ids`, where the family takes it from the caller instead of from the padding mask."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (real.cumsum(1) - 1).clamp_min(0)}


@contextlib.contextmanager
def float64():
    """What computes in float32 whatever the model's dtype, and what is made of Python's numbers, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with Float64Throughout():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def assert_close(found, expected):
    assert found.shape == expected.shape
    finite = expected.isfinite()  # processors of logits write -inf
    assert torch.equal(found[~finite], expected[~finite])
    assert (found - expected)[finite].abs().max().item() <= TOLERANCE * max(1.0, expected[finite].abs().max().item())
