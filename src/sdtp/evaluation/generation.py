"""Greedy generation from prompts, pruned and unpruned side by side, with a trace of what pruning kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence, Set
from typing import Any

from transformers import PreTrainedModel

from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.peers.trace import Held
from sdtp.evaluation.shared_prefill import left_padded
from sdtp.pruning.decoding import greedy_settings
from sdtp.pruning.pruner import TokenPruner


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came of one prompt.

    Attributes:
        pruned_ids: new tokens under the pruner, up to and without the first stop token.
        unpruned_ids: the same without pruner.
        kept: for each stage the ascending positions, among the prompt's tokens, that survived it; under a peer for each
            layer those that its cache holds.
    """

    pruned_ids: list[int]
    unpruned_ids: list[int]
    kept: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What one run made of one prompt.

    Attributes:
        ids: new tokens, up to and without the first stop token.
        kept: see `Generated.kept`; empty without a pruner.
        kept_tokens: prompt tokens that the last layer holds in its cache; of a compressed cache, each of its KV heads.
    """

    ids: list[int]
    kept: list[list[int]]
    kept_tokens: int


def generate_batch(
    model: PreTrainedModel,
    pruner: TokenPruner | Peer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int,
) -> list[Generated]:
    """Generate greedily from a batch of prompts, with and without pruning; the model's stop tokens end a row.

    Args:
        model: eval mode, unhooked.
        pruner: what the pruned run goes under; a peer takes a batch of one prompt.
        prompts: token ids of each prompt, at least one each; shorter ones are padded on the left.
        max_new_tokens: most tokens to generate, >= 1.
        pad_token_id: the token put before shorter prompts; it is masked.

    Raises:
        ValueError: an empty prompt.
    """
    unpruned = greedy(model, None, prompts, max_new_tokens, pad_token_id)
    pruned = greedy(model, pruner, prompts, max_new_tokens, pad_token_id)
    return [Generated(ours.ids, theirs.ids, ours.kept) for ours, theirs in zip(pruned, unpruned, strict=True)]


def greedy(
    model: PreTrainedModel,
    pruner: TokenPruner | Peer | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int,
    stops: Set[int] | None = None,
    min_new_tokens: int = 0,
) -> list[Reply]:
    """Generate greedily from a batch of prompts, by the model's logits alone (see `decoding.greedy_settings`).

    Args:
        model, prompts, max_new_tokens, pad_token_id: as for `generate_batch`.
        pruner: what prefills the prompts, a peer a batch of one; None for the unpruned model.
        stops: ids that end a row; None for the model's.
        min_new_tokens: so many new tokens come before any stop.

    Raises:
        ValueError: an empty prompt.
    """
    ids, real = left_padded(prompts, pad_token_id, model.device)
    ends = stop_tokens(model) if stops is None else stops
    with contextlib.nullcontext() if pruner is None else pruner(model) as trace:
        # Looked up inside: there it is the pruner's, which learns the prompt's length from it.
        generate: Any = model.generate  # of every causal LM, but PreTrainedModel does not declare it
        output = generate(
            input_ids=ids,
            attention_mask=real,
            pad_token_id=pad_token_id,
            eos_token_id=sorted(ends) or None,
            **greedy_settings(max_new_tokens, min_new_tokens),
        )
    replies = []
    for row, prompt in enumerate(prompts):
        kept = [] if trace is None else [[at for at in stage[row].tolist() if at >= 0] for stage in trace.kept]
        held = trace.entries[-1] if isinstance(trace, Held) else len(kept[-1]) if kept else len(prompt)
        replies.append(Reply(_until(output[row, ids.shape[1] :].tolist(), ends), kept, held))
    return replies


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """The ids that end generation: none, one or several."""
    stops = model.generation_config.eos_token_id
    if stops is None:
        return set()
    return {stops} if isinstance(stops, int) else set(stops)


def _until(tokens: list[int], stops: Set[int]) -> list[int]:
    """The tokens before the first stop token."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[:index]
    return tokens
