"""The compared methods, by name: what prunes the prompt of an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.training.saliency import Reduction, Target, saliency

# (prompt_ids, response_ids) of an example -> what prunes its prompt; None for nothing.
PrunerFor = Callable[[Sequence[int], Sequence[int]], TokenPruner | None]

BASELINES: dict[str, Callable[[int], scorers.Scorer]] = {
    "random": lambda seed: scorers.Random(seed),
    "recent": lambda seed: scorers.Recent(),
    "hiddennorm": lambda seed: scorers.HiddenNorm(),
    "lastquery": lambda seed: scorers.LastQuery(),
}
METHODS = ("unpruned", "sdtp", *BASELINES, "oracle")
# Methods that choose at random, and so are run once per seed.
SEEDED = ("random",)


def unpruned(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> None:
    """Nothing is pruned."""


def fixed(pruner: TokenPruner) -> PrunerFor:
    """One pruner for every example: the learned one."""
    return lambda prompt_ids, response_ids: pruner


def baseline(method: str, schedule: PruningSchedule, seed: int) -> PrunerFor:
    """A method of `BASELINES`; `seed` matters to those in `SEEDED` alone."""
    return fixed(TokenPruner(schedule, BASELINES[method](seed)))


def oracle(model: PreTrainedModel, schedule: PruningSchedule, reduction: Reduction, target: Target) -> PrunerFor:
    """Saliency of the very example, response included: what a scorer that predicted its labels perfectly would keep.

    Args:
        model: eval mode, unhooked; one forward and one backward an example.
        schedule: its layers are where saliency is taken.
        reduction, target: see `sdtp.training.saliency.saliency`.
    """

    def pruner_for(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> TokenPruner:
        labels = saliency(
            model, torch.tensor(list(prompt_ids)), torch.tensor(list(response_ids)), schedule.layers, reduction, target
        )
        return TokenPruner(schedule, scorers.Saliency(labels.unsqueeze(1)))  # [stages, 1, prompt_tokens]

    return pruner_for
