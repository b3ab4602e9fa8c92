"""Compression of the KV cache after prefill, by a rule, of the whole prompt or of what a pruner left of it."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from sdtp.evaluation.peers import operations
from sdtp.evaluation.peers.attaching import PlainModel
from sdtp.evaluation.peers.budgets import Budget, kept
from sdtp.evaluation.peers.compressed import keep_entries
from sdtp.evaluation.peers.observing import check_readable, observed
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.peers.received import received_attention, strongest
from sdtp.evaluation.peers.trace import Prefilled
from sdtp.pruning.adapter import Architecture
from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.pruner import TokenPruner


class Rule(Protocol):
    """Which entries of a layer's cache a head keeps, by the attention they received in prefill."""

    @property
    def queries(self) -> int | None:
        """How many of the last tokens' queries are read; None for all."""

    def latest(self, keep: int) -> int:
        """How many of the latest entries are kept whatever they score, where `keep` are: at most as many."""
        ...

    def scores(self, received: torch.Tensor, latest: int) -> torch.Tensor:
        """Scores [rows, tokens] float32.

        Args:
            received: [rows, tokens] float32, see `received.received_attention`.
            latest: as the rule said; fewer than the tokens.
        """
        ...


class Received:
    """The attention that each layer's keys received in a prefill, in the form of `observing.Reader`.

    Attributes:
        layers: layer -> [KV heads, tokens] float32.
    """

    def __init__(self) -> None:
        self.layers: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Take up a layer's."""
        self.layers[layer] = received_attention(queries, keys, scaling)


def chosen(rule: Rule, received: torch.Tensor, keep: int) -> torch.Tensor:
    """LongTensor [rows, keep], the columns that each row of received attention [rows, tokens] keeps, ascending."""
    if keep >= received.shape[1]:
        return torch.arange(received.shape[1], device=received.device).expand(received.shape)
    latest = rule.latest(keep)
    return strongest(rule.scores(received, latest), latest, keep)


class Compression(Peer):
    """Prefills the whole prompt, or what a pruner leaves of it, and then keeps some of each head's entries.

    Survivors keep the positions they were rotated by, and decoding goes on after the prompt's last. Every layer has
    attended to all it held: the prefill is no faster and its peak of memory no lower, only what comes after is smaller.

    Args:
        rule: which entries.
        keep: how many entries each head keeps of the tokens its layer holds; a fraction is of these, pruned or not.
        pruner: what prunes the prompt first; None for nothing.
    """

    def __init__(self, rule: Rule, keep: Budget, pruner: TokenPruner | None = None) -> None:
        self.rule, self.keep, self.pruner = rule, keep, pruner

    def check(self, architecture: Architecture) -> None:
        """See `Peer.check`."""
        check_readable(architecture, range(len(architecture.layers)), type(self.rule).__name__)

    def prefill(self, model: PlainModel, input_ids: torch.Tensor, cache: DynamicCache) -> Prefilled:
        """See `Peer.prefill`.

        Raises:
            ValueError: a pruner that this peer was not given is attached to the model.
        """
        received, layers = Received(), range(len(model.architecture.layers))
        with (
            observed(model.architecture, layers, self.rule.queries, received),
            contextlib.nullcontext() if self.pruner is None else self.pruner(model.model),
        ):
            logits = model.prefill(input_ids, cache)
        if self.pruner is None and any(isinstance(layer, PrunedLayer) for layer in cache.layers):
            raise ValueError("a pruner is attached to the model of a peer: give it to the peer, as pruner=")
        found = (received.layers[layer] for layer in layers)
        columns = [chosen(self.rule, one, kept(self.keep, one.shape[1])) for one in found]
        return Prefilled(logits, keep_entries(cache, columns, input_ids.shape[1]))

    def prefill_flops(self, config: Any, prompt_tokens: int) -> float:
        """See `Peer.prefill_flops`."""
        schedule = None if self.pruner is None else self.pruner.schedule
        scorer = None if self.pruner is None else self.pruner.scorer
        return operations.compression(config, prompt_tokens, self.rule.queries, schedule, scorer)
