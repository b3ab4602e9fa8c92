"""The compared methods, by name: what prunes the prompt of an example. `make` says what a name means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from sdtp.evaluation import names
from sdtp.evaluation.peers.budgets import Budget, entries_beside, final_survivors, fraction, mean_entries
from sdtp.evaluation.peers.compression import Compression, Rule
from sdtp.evaluation.peers.fastkv import FastKV
from sdtp.evaluation.peers.gemfilter import GemFilter
from sdtp.evaluation.peers.h2o import H2O
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.training.saliency import Reduction, Target, saliency

T = TypeVar("T")

# (prompt_ids, response_ids) of an example -> what prefills its prompt in place of the model; None for nothing.
PrunerFor = Callable[[Sequence[int], Sequence[int]], TokenPruner | Peer | None]

BASELINES: dict[str, type[scorers.Scorer]] = {cls.__name__.lower(): cls for cls in scorers.BASELINES}
RULES: dict[str, Callable[[], Rule]] = {"snapkv": SnapKV, "h2o": H2O}
# Of 32 layers the one that the peers' papers select at, 0-based (Llama 3.1 8B).
PAPERS_LAYER = {"gemfilter": 13, "fastkv": 15}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A `PrunerFor` that is the same for every example, so that several may run together.

    Attributes:
        pruner: the learned pruner, say, or a peer; None for nothing.
    """

    pruner: TokenPruner | Peer | None

    @property
    def batches(self) -> bool:
        """Whether it takes several prompts at once."""
        return not isinstance(self.pruner, Peer)

    def __call__(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> TokenPruner | Peer | None:
        """See `PrunerFor`."""
        return self.pruner


unpruned = Fixed(None)


def make(
    method: str,
    model: PreTrainedModel,
    *,
    schedule: PruningSchedule | None = None,
    pruner: TokenPruner | None = None,
    seed: int = 0,
    layer: int | None = None,
    cache_keep: float | None = None,
    reduction: Reduction = "l2",
    target: Target = "loss",
) -> PrunerFor:
    """What a name of `names.METHODS` means: the one place that says it.

    Args:
        method: the name. `names.needs` says which of the following it uses; what it does not is not looked at.
        model: eval mode, unhooked.
        schedule: where a pruner removes tokens, and how many; whose survivors a peer matches.
        pruner: the trained one, of as many stages as the schedule, which takes the place of its own; for `sdtp-tuned`
            the tuned one, whose own schedule stays.
        seed: of random choices.
        layer: where GemFilter and FastKV select, 0-based; None for the layer of their papers, as a share of the depth.
        cache_keep: share of the entries that a rule on top of another method keeps of what each layer holds.
        reduction, target: of the oracle's labels.

    Raises:
        ValueError: an unknown name; no schedule, pruner or share for a method that needs it.
    """
    needed = names.needs(method)
    base, rule = names.parts(method)
    if rule is not None:
        below = make(base, model, schedule=schedule, pruner=pruner)
        return compressed(below, rule, fraction(_given(cache_keep, "cache_keep", method)))
    if base == "unpruned":
        return unpruned
    plan = _given(schedule, "schedule", method)
    if base in names.LEARNED:
        trained = _given(pruner, "pruner", method)
        if base == names.TUNED:
            return Fixed(trained)
        learned = trained.with_schedule(plan)
        return Fixed(learned if base == "sdtp" else learned.at_stages(names.half(plan.stages)))
    if base == "oracle":
        return oracle(model, plan, reduction, target)
    if base in BASELINES:
        return baseline(base, plan, seed)
    num_layers = model.config.num_hidden_layers
    if layer is None and "layer" in needed:
        layer = selecting_layer(base, num_layers)
    return Fixed(peer(base, plan, num_layers, layer or 0))


def _given(value: T | None, name: str, method: str) -> T:
    if value is None:
        raise ValueError(f"method {method} needs {name}, which is not given")
    return value


def selecting_layer(method: str, num_layers: int) -> int:
    """The layer, 0-based, that GemFilter or FastKV selects at in a model of so many layers: as deep as in its paper."""
    return max(0, min(num_layers - 2, round(PAPERS_LAYER[method] * num_layers / 32)))


def baseline(method: str, schedule: PruningSchedule, seed: int) -> PrunerFor:
    """A method of `BASELINES`; `seed` matters to those in `names.SEEDED` alone."""
    return Fixed(TokenPruner(schedule, baseline_scorer(method, seed)))


def baseline_scorer(method: str, seed: int = 0) -> scorers.Scorer:
    """The scorer of a method of `BASELINES`; `seed` matters to those in `names.SEEDED` alone."""
    return BASELINES[method](**({"seed": seed} if method in names.SEEDED else {}))


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


def peer(method: str, schedule: PruningSchedule, num_layers: int, layer: int) -> Peer:
    """A method of `names.PEERS` at the survivors of a schedule, whatever the prompt's length.

    GemFilter selects as many tokens as the last stage leaves. FastKV hands on so many, and its first layers hold what
    makes the whole cache as large as the schedule's. The compressions keep the schedule's mean over layers in each.

    Args:
        method: its name.
        schedule: whose survivors are matched.
        num_layers: decoder layers of the model.
        layer: where GemFilter and FastKV select, 0-based; nothing to the compressions.

    Raises:
        ValueError: the schedule prunes at a layer the model does not have, or no layer comes before or after `layer`.
    """
    survivors = final_survivors(schedule)
    if method == "gemfilter":
        return GemFilter(layer, survivors)
    if method == "fastkv":
        return FastKV(layer, survivors, entries_beside(schedule, num_layers, layer + 1, survivors))
    return Compression(RULES[method](), mean_entries(schedule, num_layers))


def compressed(pruner_for: PrunerFor, rule: str, keep: Budget) -> PrunerFor:
    """The cache that another method leaves, compressed by a rule of `RULES` (paper, Table 6: H2O, 40% kept).

    Args:
        pruner_for: what prunes the prompt: a `TokenPruner` or nothing.
        rule: its name.
        keep: how many entries each head keeps of those its layer holds.
    """

    def compression_for(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Peer:
        pruner = pruner_for(prompt_ids, response_ids)
        if isinstance(pruner, Peer):
            raise TypeError(f"{type(pruner).__name__} cannot be compressed on top: only what a TokenPruner leaves can")
        return Compression(RULES[rule](), keep, pruner)

    return compression_for
