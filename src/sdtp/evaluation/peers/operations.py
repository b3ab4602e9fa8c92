"""FLOPs of prefills that read attention: what the model computes and, on top, the products that scores are made of.

Counted as `sdtp.pruning.flops` counts: a multiply-add is two operations, and a query meets the keys up to its own.
"""

from __future__ import annotations

from typing import Any

from sdtp.pruning import flops
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Scorer


def reading(config: Any, prompt_tokens: int, queries: int | None, schedule: PruningSchedule | None = None) -> float:
    """Operations to compute the attention of the last queries to all keys once more, in every layer, without values.

    A kernel such as sdpa keeps no probabilities, so they are computed again; the projections are at hand.

    Args:
        config: see `flops.Dimensions.of`.
        prompt_tokens: `N` >= 1.
        queries: of how many of the last tokens; None for all.
        schedule: which tokens are left in each layer; None for all.
    """
    size = flops.Dimensions.of(config)
    num_layers = len(size.layers)
    lengths = [prompt_tokens] * num_layers if schedule is None else schedule.layer_lengths(prompt_tokens, num_layers)
    total = 0
    for layer, tokens in zip(size.layers, lengths, strict=True):
        unread = 0 if queries is None else max(0, tokens - queries)
        total += 2 * (layer.pairs(tokens) - layer.pairs(unread)) * layer.query
    return float(total)


def compression(
    config: Any,
    prompt_tokens: int,
    queries: int | None,
    schedule: PruningSchedule | None = None,
    scorer: Scorer | None = None,
) -> float:
    """Operations of a prefill whose cache is compressed after it: the whole prefill, and reading the attention.

    Without a schedule that is more than the unpruned model takes: nothing is saved before the cache is full.

    Args:
        config, prompt_tokens, queries, schedule: see `reading`.
        scorer: what prunes, see `flops.prefill`.
    """
    return flops.prefill(config, prompt_tokens, schedule, scorer) + reading(config, prompt_tokens, queries, schedule)


def selection_and_rerun(config: Any, prompt_tokens: int, layer: int, selected: int) -> float:
    """Operations of both passes of GemFilter: the layers up to `layer` on the prompt, all of them on what is selected.

    Args:
        config: see `flops.Dimensions.of`.
        prompt_tokens: `N` >= 1.
        layer: the filter layer, which runs whole; its last query meets every key once more.
        selected: tokens of the second pass.
    """
    size = flops.Dimensions.of(config)
    first = sum(one.operations(prompt_tokens, one.pairs(prompt_tokens)) for one in size.layers[: layer + 1])
    return first + 2 * prompt_tokens * size.layers[layer].query + flops.prefill(config, selected)
