"""A prompt's way through a pruner: what every stage scored, and what it kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.scorers import Scorer, StageView


@dataclasses.dataclass(frozen=True)
class PromptTrace:
    """What happened to a prompt of N tokens.

    Attributes:
        kept: for each stage the ascending positions (0 to N - 1) that are left after it.
        scores: for each stage the scores by position of the tokens that entered it; empty for a stage that had nothing
            to remove, which asks for no scores.
    """

    kept: list[list[int]]
    scores: list[dict[int, float]]


class Watched:
    """A pruner that does what another one does, and notes what its scorer says; for one run.

    Attributes:
        pruner: to run under in place of the other.
    """

    def __init__(self, pruner: TokenPruner) -> None:
        self._found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * pruner.schedule.stages
        self.pruner = TokenPruner(pruner.schedule, _twin(pruner.scorer, self._note), pruner.trained_for)

    def scores(self, row: int) -> list[dict[int, float]]:
        """As `PromptTrace.scores`, of one row of the batch."""
        return [_of_row(row, *stage) if stage else {} for stage in self._found]

    def _note(self, view: StageView, scores: torch.Tensor) -> None:
        self._found[view.stage] = view.positions, scores


def trace_prompt(model: PreTrainedModel, pruner: TokenPruner, ids: list[int]) -> PromptTrace:
    """Prefill one prompt under a pruner.

    Args:
        model: eval mode, unhooked.
        pruner: for it.
        ids: of the prompt's tokens, at least one.

    Raises:
        ValueError: the pruner is not for this model, or cannot prune this prompt.
    """
    watched = Watched(pruner)
    with watched.pruner(model) as trace, torch.inference_mode():
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, logits_to_keep=1)
    return PromptTrace([stage[0].tolist() for stage in trace.kept], watched.scores(0))


def _of_row(row: int, positions: torch.Tensor, scores: torch.Tensor) -> dict[int, float]:
    """The scores of one row's tokens by position; padding has position -1."""
    pairs = zip(positions[row].tolist(), scores[row].tolist(), strict=True)
    return {position: score for position, score in pairs if position >= 0}


def _twin(scorer: Scorer, note: Callable[[StageView, torch.Tensor], None]) -> Scorer:
    """A scorer that gives what `scorer` does, and tells `note`.

    It is of a class made from the scorer's, not a wrapper around it: a pruner asks what kind of scorer it has.
    """
    kind: Any = type(scorer)

    def score(self: Any, view: StageView) -> torch.Tensor:
        scores: torch.Tensor = kind.score(self, view)
        note(view, scores)
        return scores

    twin = copy.copy(scorer)
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), {"score": score}))  # also of frozen ones
    return twin
