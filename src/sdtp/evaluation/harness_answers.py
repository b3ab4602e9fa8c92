"""What `PrunedLM` finds of a request, and where answers go that outlive the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict


class Scored(TypedDict):
    """What was found of a request: a continuation after a context.

    Attributes:
        log_likelihood: of the continuation.
        greedy: whether it is what greedy decoding gives.
        prompt_tokens: of the context, of which `kept_tokens` were left at the last layer.
    """

    log_likelihood: float
    greedy: bool
    prompt_tokens: int
    kept_tokens: int


class Known(Protocol):
    """Answers that outlive the process; a request is the ids of its context, as the model is fed it, and continuation.

    lm-eval's own, `CachingLM`, are pickles in a database, and reading a pickle runs what it says.
    """

    def find(self, context: Sequence[int], continuation: Sequence[int]) -> Scored | None:
        """The answer to a request; None where there is none yet."""

    def add(self, context: Sequence[int], continuation: Sequence[int], scored: Scored) -> None:
        """Keep an answer."""
