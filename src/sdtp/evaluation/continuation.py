"""Continuation: how surprised is the model by the text that follows?"""

from __future__ import annotations

from sdtp.evaluation.teacher_forcing import Forced


def loss(forced: Forced) -> float:
    """Mean negative log-likelihood of the response tokens in nats."""
    return -float(forced.log_probs.double().mean())
