"""The response as the model sees it after its prompt, in both stages: one forward, and the loss it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from sdtp.errors import UserError

# Response positions whose distributions are held in float32 at once: 16 of 152K tokens are 10 MB each.
_BLOCK = 16


def response_logits(model: PreTrainedModel, prompt_ids: torch.Tensor, response_ids: torch.Tensor) -> torch.Tensor:
    """One forward over prompt and response, without a cache.

    Args:
        model: causal LM.
        prompt_ids: LongTensor [prompt_tokens], at least one.
        response_ids: LongTensor [response_tokens], at least one.

    Returns:
        [response_tokens, vocabulary], the logits that predict each response token.
    """
    return batch_logits(model, [prompt_ids], [response_ids])


def batch_logits(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor]
) -> torch.Tensor:
    """One forward over several prompts with their responses, without a cache; each row is what it is alone.

    Shorter rows are padded on the right and no mask tells so: attention is causal, so no real token sees what comes
    after it, every row's positions count from 0, and kernels stay on the path they take without padding. Only the
    states that predict a response token reach the model's head: logits of every token could outgrow the model.

    Args:
        model: causal LM.
        prompts: LongTensors [prompt_tokens], at least one token each.
        responses: LongTensors [response_tokens], at least one token each, in the order of the prompts.

    Returns:
        [response tokens of all rows, vocabulary], the logits that predict each response token, row after row.

    Raises:
        UserError: rows differ in length, and the model is one that cannot be padded (see `pads_exactly`).
        RuntimeError: the model does not compute its logits by calling its output embeddings.
    """
    # The last response token predicts nothing and need not run.
    rows = [torch.cat([prompt, response[:-1]]) for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(row) for row in rows]
    if min(lengths) < max(lengths) and not pads_exactly(model):
        raise UserError(
            f"rows of {min(lengths)} to {max(lengths)} tokens: the rotary frequencies of {type(model).__name__} follow "
            "the longest row, so rows of one length are accepted"
        )
    # A row's own last token: the states of real text, wherever padding would be odd to the model.
    ids = torch.stack([torch.cat([row, row[-1:].expand(max(lengths) - len(row))]) for row in rows]).to(model.device)
    counts = [len(response) for response in responses]
    row_of = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    column_of = torch.cat([torch.arange(n - count, n) for n, count in zip(lengths, counts, strict=True)])

    def predicting(head: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        hidden = args[0]  # [rows, tokens, hidden]
        return (hidden[row_of.to(hidden.device), column_of.to(hidden.device)][None],)  # [1, response tokens, hidden]

    hook = model.get_output_embeddings().register_forward_pre_hook(predicting)
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if logits.shape[:2] != (1, sum(counts)):
        raise RuntimeError(
            f"{type(model).__name__} gives logits {tuple(logits.shape)} where (1, {sum(counts)}, vocabulary) were "
            "asked for: it does not call its output embeddings"
        )
    return logits[0]


def pads_exactly(model: nn.Module) -> bool:
    """Whether a row's states are the same whatever longer rows run beside it.

    They are in a causal decoder, but for rotary frequencies that are chosen by the longest row (dynamic NTK, LongRoPE).
    """
    return not any(
        "dynamic" in kind or kind == "longrope"
        for module in model.modules()
        for kind in _rotary_kinds(getattr(module, "rope_type", None))
    )


def _rotary_kinds(kinds: Any) -> list[str]:
    """The words of a rotary embedding's `rope_type`: one, or one for each kind of layer."""
    return [str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])]


def response_cross_entropy(logits: torch.Tensor, response_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the response, in nats a token, computed in float32 at least.

    Args:
        logits: [tokens, vocabulary], the logits that predict each response token.
        response_ids: LongTensor [tokens], on any device.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, response_ids.to(logits.device))


def response_kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence from the reference's next-token distributions to those of `logits`, in nats a token.

    `KL(reference || logits) = sum_v q_v (log q_v - log p_v)`, 0 where the two agree. Computed in float32 at least, a
    few positions at a time, and again so in the backward pass: beside the two arguments no [tokens, vocabulary] tensor
    is kept, and the gradient alone is made.

    Args:
        logits: [tokens, vocabulary], finite. The gradient flows to them, and only once (no second derivatives).
        reference: [tokens, vocabulary], finite, the unpruned model's; a constant.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.shape != reference.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and their reference {tuple(reference.shape)}: must be equal"
        )
    divergence: torch.Tensor = _ResponseKL.apply(logits, reference)
    return divergence


class _ResponseKL(torch.autograd.Function):
    """Blocks of positions, in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, reference)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for start in range(0, len(logits), _BLOCK):
            rows = slice(start, start + _BLOCK)
            log_q = reference[rows].to(wide).log_softmax(-1)
            difference = log_q - logits[rows].to(wide).log_softmax(-1)
            total += difference.mul_(log_q.exp_()).sum()
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, reference = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), _BLOCK):
            rows = slice(start, start + _BLOCK)
            excess = logits[rows].to(grad_output.dtype).softmax(-1)  # d KL / d logits = (p - q) / tokens
            gradient[rows] = excess.sub_(reference[rows].to(grad_output.dtype).softmax(-1)).mul_(
                grad_output / len(logits)
            )
        return gradient, None
