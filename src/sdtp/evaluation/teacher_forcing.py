"""What a model, pruned or not, makes of a known response: one prefill, then the response fed on its cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sdtp.pruning.pruner import TokenPruner


@dataclasses.dataclass(frozen=True)
class Forced:
    """Each response token, predicted from the prompt and the response tokens before it.

    Attributes:
        log_probs: [response] float32, natural log-probability of the response's own tokens.
        argmax: LongTensor [response], the most likely token at each place.
        kept_tokens: prompt tokens the last layer holds in its cache.
    """

    log_probs: torch.Tensor
    argmax: torch.Tensor
    kept_tokens: int


@torch.inference_mode()
def forced_logits(
    model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int], pruner: TokenPruner | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prefill the prompt, pruned if `pruner` is given, and predict each response token from those before it.

    The response never takes part in prefill: no scorer sees it, and none of it is removed. Same path with and without
    pruner.

    Args:
        model: eval mode, unhooked.
        prompt_ids: token ids, at least one.
        response_ids: token ids, at least one.
        pruner: None for the unpruned model.

    Returns:
        Logits [response, vocabulary] in the model's dtype and LongTensor [response] of the response, on the model's
        device; prompt tokens that the last layer holds in its cache.

    Raises:
        ValueError: an empty prompt or response.
    """
    if not len(prompt_ids) or not len(response_ids):
        raise ValueError(f"{len(prompt_ids)} prompt and {len(response_ids)} response tokens: both need at least one")
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    response = torch.tensor([list(response_ids)], device=model.device)
    kept = len(prompt_ids)
    with contextlib.nullcontext() if pruner is None else pruner(model) as trace:
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1:]
        if trace is not None and trace.kept:
            kept = int((trace.kept[-1] >= 0).sum())
        if response.shape[1] > 1:
            rest = model(input_ids=response[:, :-1], cache=output.cache, use_cache=True).logits
            logits = torch.cat([logits, rest], dim=1)  # [1, response, vocabulary]
    return logits[0], response[0], kept


@torch.inference_mode()
def force(
    model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int], pruner: TokenPruner | None = None
) -> Forced:
    """The response's probabilities under `forced_logits`, whose arguments and errors these are."""
    logits, response, kept = forced_logits(model, prompt_ids, response_ids, pruner)
    own = logits.float().log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
    return Forced(own.cpu(), logits.argmax(-1).cpu(), kept)
