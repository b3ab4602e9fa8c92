"""Greedy generation from prompts, pruned and unpruned side by side, with a trace of what pruning kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sdtp.pruning.pruner import TokenPruner


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came of one prompt.

    Attributes:
        pruned_ids: new tokens under the pruner, up to and without the first stop token.
        unpruned_ids: the same without pruner.
        kept: for each stage the ascending positions, among the prompt's tokens, that survived it.
    """

    pruned_ids: list[int]
    unpruned_ids: list[int]
    kept: list[list[int]]


def generate_batch(
    model: PreTrainedModel,
    pruner: TokenPruner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int,
) -> list[Generated]:
    """Generate greedily from a batch of prompts, with and without pruning; the model's stop tokens end a row.

    Args:
        model: eval mode, unhooked.
        pruner: what the pruned run goes under.
        prompts: token ids of each prompt, at least one each; shorter ones are padded on the left.
        max_new_tokens: most tokens to generate, >= 1.
        pad_token_id: the token put before shorter prompts; it is masked.

    Raises:
        ValueError: an empty prompt.
    """
    if any(not len(prompt) for prompt in prompts):
        raise ValueError(f"prompts have {[len(prompt) for prompt in prompts]} tokens: each needs at least one")
    longest = max(len(prompt) for prompt in prompts)
    padded = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    inputs = {
        "input_ids": torch.tensor(padded, device=model.device),
        "attention_mask": torch.tensor(real, device=model.device),
    }
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad_token_id}
    generate: Any = model.generate  # of every causal LM, but PreTrainedModel does not declare it
    unpruned = generate(**inputs, **settings)
    with pruner(model) as trace:
        # Looked up anew: inside the context it is the pruner's, which learns the prompt's length from it.
        generate = model.generate
        pruned = generate(**inputs, **settings)
    stops = stop_tokens(model)
    return [
        Generated(
            _until(pruned[row, longest:].tolist(), stops),
            _until(unpruned[row, longest:].tolist(), stops),
            [[position for position in stage[row].tolist() if position >= 0] for stage in trace.kept],
        )
        for row in range(len(prompts))
    ]


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """The ids that end generation: none, one or several."""
    stops = model.generation_config.eos_token_id
    if stops is None:
        return set()
    return {stops} if isinstance(stops, int) else set(stops)


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens before the first stop token."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[:index]
    return tokens
