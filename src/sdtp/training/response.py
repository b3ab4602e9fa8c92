"""The response as the model sees it after its prompt, in both stages: one forward, and the loss it is given."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel


def response_logits(model: PreTrainedModel, prompt_ids: torch.Tensor, response_ids: torch.Tensor) -> torch.Tensor:
    """One forward over prompt and response, without a cache.

    Args:
        model: causal LM.
        prompt_ids: LongTensor [prompt_tokens], at least one.
        response_ids: LongTensor [response_tokens], at least one.

    Returns:
        [response_tokens, vocabulary], the logits that predict each response token.
    """
    # The last response token predicts nothing and need not run; full logits could outgrow the model.
    ids = torch.cat([prompt_ids, response_ids[:-1]])[None].to(model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(response_ids)).logits
    return logits[0]


def response_cross_entropy(logits: torch.Tensor, response_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the response, in nats a token, computed in float32 at least.

    Args:
        logits: [tokens, vocabulary], the logits that predict each response token.
        response_ids: LongTensor [tokens], on any device.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, response_ids.to(logits.device))
