"""What a model, pruned or not, makes of a known response: one prefill, then the response fed on its cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.peers.trace import Held
from sdtp.evaluation.shared_prefill import follow, prefill
from sdtp.pruning.pruner import TokenPruner


@dataclasses.dataclass(frozen=True)
class Forced:
    """Each response token, predicted from the prompt and the response tokens before it.

    Attributes:
        log_probs: [response] float32, natural log-probability of the response's own tokens.
        argmax: LongTensor [response], the most likely token at each place.
        kept_tokens: prompt tokens the last layer holds in its cache; of a compressed cache, each of its KV heads.
    """

    log_probs: torch.Tensor
    argmax: torch.Tensor
    kept_tokens: int


def forced_logits(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    pruner: TokenPruner | Peer | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prefill the prompt, pruned if `pruner` is given, and predict each response token from those before it.

    The response never takes part in prefill: no scorer sees it, and none of it is removed. Same path with and without
    pruner.

    Args:
        model: eval mode, unhooked.
        prompt_ids: token ids, at least one.
        response_ids: token ids, at least one.
        pruner: what prefills the prompt; None for the unpruned model.

    Returns:
        Logits [response, vocabulary] in the model's dtype and LongTensor [response] of the response, on the model's
        device; prompt tokens that the last layer holds in its cache, see `Forced.kept_tokens`.

    Raises:
        ValueError: an empty prompt or response.
    """
    [(logits, response, kept)] = batch_logits(model, [prompt_ids], [response_ids], pruner)
    return logits, response, kept


def force(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    pruner: TokenPruner | Peer | None = None,
) -> Forced:
    """The response's probabilities under `forced_logits`, whose arguments and errors these are."""
    return summary(*forced_logits(model, prompt_ids, response_ids, pruner))


@torch.inference_mode()
def summary(logits: torch.Tensor, response: torch.Tensor, kept_tokens: int) -> Forced:
    """What counts of one response's logits, as `forced_logits` and `batch_logits` give them."""
    own = logits.float().log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
    return Forced(own.cpu(), logits.argmax(-1).cpu(), kept_tokens)


@torch.inference_mode()
def batch_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pruner: TokenPruner | Peer | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """`forced_logits` of several examples in one prefill, which gives each what it has alone but for rounding.

    Args:
        model, pruner: as for `forced_logits`; a peer takes one prompt.
        prompts, responses: token ids, at least one each; prompts of one length need no padding, and cost least.

    Raises:
        ValueError: an empty prompt or response.
    """
    kept = [len(prompt) for prompt in prompts]
    with contextlib.nullcontext() if pruner is None else pruner(model) as trace:
        prefilled = prefill(model, prompts)
        if isinstance(trace, Held):
            kept = [trace.entries[-1]]
        elif trace is not None and trace.kept:
            kept = (trace.kept[-1] >= 0).sum(1).tolist()
        logits = follow(model, prefilled, range(len(prompts)), responses, last=True)
    ids = [torch.tensor(list(response), device=model.device) for response in responses]
    return list(zip(logits, ids, kept, strict=True))
