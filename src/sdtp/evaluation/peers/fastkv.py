"""FastKV (arXiv 2502.01068): beyond one layer only the tokens it attends to go on; every layer's cache is smaller."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from sdtp.evaluation.peers import operations
from sdtp.evaluation.peers.attaching import PlainModel
from sdtp.evaluation.peers.budgets import Budget, kept
from sdtp.evaluation.peers.compressed import keep_entries
from sdtp.evaluation.peers.compression import Received, chosen
from sdtp.evaluation.peers.observing import check_readable, observed
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.evaluation.peers.trace import Prefilled
from sdtp.pruning.adapter import Architecture
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import StageView


class _Propagated:
    """Scores tokens by the attention they received in the layer before, over all heads, by a rule."""

    question_conditioned: ClassVar[bool] = True

    def __init__(self, rule: SnapKV, received: Received, latest: int) -> None:
        self.rule, self.received, self.latest = rule, received, latest

    def score(self, view: StageView) -> torch.Tensor:
        """See `scorers.Scorer.score`."""
        return self.rule.scores(self.received.layers[view.layer - 1].mean(0, keepdim=True), self.latest)


class FastKV(Peer):
    """Single-stage pruning by the attention of the prompt's end, with a cache that is compressed in every layer.

    After `layer` has run on the whole prompt, the tokens that its last queries attend to, over all heads, go on, with
    those queries' own; the others are removed. What goes on keeps its positions. Each layer's cache is then compressed
    as SnapKV does it, which is apart from what goes on: the first layers may hold fewer tokens than they hand on. It is
    compressed after prefill, whose peak of memory is therefore the one of the token selection alone.

    Args:
        layer: the last layer that runs on the whole prompt, 0-based, any but the model's last. The paper has 15 of 32
            for Llama 3.1 8B.
        propagate: tokens of the prompt that go on; a fraction is the one kept.
        keep: entries of each head in every layer, of the prompt's tokens; a layer that has no more keeps them all.
        rule: how attention makes scores, for what goes on and for the caches.
    """

    def __init__(self, layer: int, propagate: Budget, keep: Budget, rule: SnapKV | None = None) -> None:
        self.layer, self.propagate, self.keep = layer, propagate, keep
        self.rule = SnapKV() if rule is None else rule

    def check(self, architecture: Architecture) -> None:
        """See `Peer.check`."""
        layers = len(architecture.layers)
        if not 0 <= self.layer < layers - 1:
            raise ValueError(
                f"layer is {self.layer}: 0 to {layers - 2} is accepted, a layer of the model comes after it"
            )
        check_readable(architecture, range(layers), type(self).__name__)

    def prefill(self, model: PlainModel, input_ids: torch.Tensor, cache: DynamicCache) -> Prefilled:
        """See `Peer.prefill`."""
        tokens, layers = input_ids.shape[1], range(len(model.architecture.layers))
        schedule, received = self._schedule(tokens), Received()
        pruner = TokenPruner(schedule, _Propagated(self.rule, received, schedule.min_local))
        with observed(model.architecture, layers, self.rule.queries, received), pruner(model.model):
            logits = model.prefill(input_ids, cache)
        entries = kept(self.keep, tokens)
        columns = [chosen(self.rule, received.layers[layer], entries) for layer in layers]
        return Prefilled(logits, keep_entries(cache, columns, tokens))

    def _schedule(self, tokens: int) -> PruningSchedule:
        """The one stage, for a prompt of so many tokens."""
        budget = kept(self.propagate, tokens)
        latest = self.rule.latest(budget)
        return PruningSchedule((self.layer + 1,), sinks=0, local=0.0, min_local=latest, budget=budget)

    def prefill_flops(self, config: Any, prompt_tokens: int) -> float:
        """See `Peer.prefill_flops`."""
        return operations.compression(config, prompt_tokens, self.rule.queries, self._schedule(prompt_tokens))
