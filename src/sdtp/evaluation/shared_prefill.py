"""Prompts prefilled once, in a batch, and any number of responses fed on copies of their cache."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sdtp.pruning.adapter import cache_of
from sdtp.verification.hidden_keys import takes_position_ids


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What a prefill of prompts left.

    Attributes:
        logits: [prompts, vocabulary] in the model's dtype, at each prompt's last token.
        lengths: tokens of each prompt.
        cache: of all prompts.
        mask: LongTensor [prompts, columns], 0 at left padding; None if there is none.
    """

    logits: torch.Tensor
    lengths: list[int]
    cache: Cache
    mask: torch.Tensor | None


def left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch, shorter ones padded on the left.

    Args:
        prompts: token ids of each, at least one each.
        pad_token_id: the token put before shorter prompts; it is masked.
        device: of the result.

    Returns:
        LongTensors [prompts, longest]: the ids, and a mask, 1 at the prompts' own tokens.

    Raises:
        ValueError: an empty prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(f"prompts have {lengths} tokens: each needs at least one")
    longest = max(lengths)
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (longest - length) + [1] * length for length in lengths]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Prefill a batch of prompts; a pruner whose context is open removes tokens from them.

    Args:
        model: eval mode.
        prompts: token ids of each, at least one each; shorter ones are padded on the left.

    Raises:
        ValueError: an empty prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    ids, real = left_padded(prompts, 0, model.device)  # masked, so that any id does for padding
    places: dict[str, torch.Tensor] = {}
    mask = None
    if min(lengths) < max(lengths):
        places["attention_mask"] = mask = real
        if takes_position_ids(model):
            places["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **places)
    return Prefilled(output.logits[:, -1], lengths, cache_of(output), mask)


@torch.inference_mode()
def follow(
    model: PreTrainedModel, prefilled: Prefilled, rows: Sequence[int], responses: Sequence[Sequence[int]], last: bool
) -> list[torch.Tensor]:
    """Predict each token of responses from their prompts and the tokens before it, in one forward at most.

    No scorer sees a response and none of it is removed. Under a pruner this has to run in the context of the prefill.

    Args:
        model: as for `prefill`.
        prefilled: the prompts.
        rows: which prompt each response follows; a prompt may have several or none.
        responses: token ids of each, at least one each.
        last: whether the prefill serves no later call: then its cache is used up rather than copied.

    Returns:
        Of each response, logits [response, vocabulary] in the model's dtype.

    Raises:
        ValueError: an empty response.
    """
    lengths = [len(response) for response in responses]
    if not all(lengths):
        raise ValueError(f"responses have {lengths} tokens: each needs at least one")
    chosen = torch.tensor(rows)
    first = prefilled.logits[chosen, None]  # [responses, 1, vocabulary]
    fed = max(lengths) - 1
    if fed == 0:
        return list(first)
    cache = prefilled.cache if last else copy.deepcopy(prefilled.cache)
    if list(rows) != list(range(len(prefilled.lengths))):
        cache.batch_select_indices(chosen)
    # Padding on the right comes after all that is read, so that causal attention hides it without a mask.
    ids = [[*response[:-1], *[0] * (fed - len(response) + 1)] for response in responses]
    places: dict[str, torch.Tensor] = {}
    if prefilled.mask is not None:
        mask = prefilled.mask[chosen]
        places["attention_mask"] = torch.cat([mask, mask.new_ones(len(rows), fed)], dim=1)
        if takes_position_ids(model):
            places["position_ids"] = mask.sum(1, keepdim=True) + torch.arange(fed, device=mask.device)
    later = model(input_ids=torch.tensor(ids, device=model.device), cache=cache, use_cache=True, **places).logits
    both = torch.cat([first, later], dim=1)
    return [logits[:length] for logits, length in zip(both, lengths, strict=True)]
