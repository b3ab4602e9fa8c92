"""One prompt's way through a pruner: what every stage scored, and what it kept."""

from __future__ import annotations

import copy
import dataclasses
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


def trace_prompt(model: PreTrainedModel, pruner: TokenPruner, ids: list[int]) -> PromptTrace:
    """Prefill one prompt under a pruner.

    Args:
        model: eval mode, unhooked.
        pruner: for it.
        ids: of the prompt's tokens, at least one.

    Raises:
        ValueError: the pruner is not for this model, or cannot prune this prompt.
    """
    scores: list[dict[int, float]] = [{} for _ in pruner.schedule.layers]
    watched = TokenPruner(pruner.schedule, _watched(pruner.scorer, scores), pruner.trained_for)
    with watched(model) as trace, torch.inference_mode():
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, logits_to_keep=1)
    return PromptTrace([stage[0].tolist() for stage in trace.kept], scores)


def _watched(scorer: Scorer, found: list[dict[int, float]]) -> Scorer:
    """A scorer that gives what `scorer` does, and notes it by stage and position.

    It is of a class made from the scorer's, not a wrapper around it: a pruner asks what kind of scorer it has.
    """
    kind: Any = type(scorer)

    def score(self: Any, view: StageView) -> torch.Tensor:
        scores: torch.Tensor = kind.score(self, view)
        found[view.stage] = dict(zip(view.positions[0].tolist(), scores[0].tolist(), strict=True))
        return scores

    twin = copy.copy(scorer)
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), {"score": score}))  # also of frozen ones
    return twin
