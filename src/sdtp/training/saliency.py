"""Stage 1: how much the response depends on each prompt token, at every pruning stage of the frozen model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder_layers
from sdtp.training.half import loss_scales
from sdtp.training.response import batch_logits, response_cross_entropy

Reduction = Literal["abs", "signed", "l2"]
Target = Literal["loss", "logit"]


class NotFiniteError(RuntimeError):
    """Saliency of an example is not a number everywhere.

    Attributes:
        row: the example's place in its batch, from 0.
    """

    def __init__(self, row: int, layer: int, stage: int) -> None:
        super().__init__(f"saliency of layer {layer} (stage {stage}) is not finite: try a wider model.dtype")
        self.row = row


def saliency(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    response_ids: torch.Tensor,
    layers: Sequence[int],
    reduction: Reduction = "abs",
    target: Target = "loss",
    gradient_checkpointing: bool = False,
) -> torch.Tensor:
    """Gradient times input of every prompt token at every stage, of one example: `batch_saliency` of a batch of one.

    Args:
        model: causal LM in eval mode.
        prompt_ids: LongTensor [prompt_tokens].
        response_ids: LongTensor [response_tokens], at least one: what the model should answer.
        layers, reduction, target, gradient_checkpointing: see `batch_saliency`.

    Returns:
        [stages, prompt_tokens] float32 on the model's device, detached.

    Raises:
        UserError, RuntimeError: see `batch_saliency`.
    """
    return batch_saliency(
        model, [prompt_ids], [response_ids], layers, reduction, target, gradient_checkpointing=gradient_checkpointing
    )[0]


def batch_saliency(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    layers: Sequence[int],
    reduction: Reduction = "abs",
    target: Target = "loss",
    gradient_checkpointing: bool = False,
) -> list[torch.Tensor]:
    """Gradient times input of every prompt token at every stage, in one forward and one backward (paper §3.1, eq. 3).

    The model is not pruned. Its weights get no gradient, and it is left as it was. What is differentiated is the sum of
    the examples' own targets, and no example's states depend on another's: each gets the saliency it has alone.

    Args:
        model: causal LM in eval mode.
        prompts: LongTensors [prompt_tokens].
        responses: LongTensors [response_tokens], at least one token each: what the model should answer to each prompt.
        layers: the stages' decoder layers, 0-based, ascending; saliency is that of the states entering each.
        reduction: see `reduce`.
        target: what is differentiated: "loss", the mean cross-entropy of the response, or "logit", the mean logit of
            the response tokens.
        gradient_checkpointing: recompute each layer in the backward pass; the same saliency for one more forward, in a
            fraction of the memory that layers keep. The response's logits take as much.

    Returns:
        For each example [stages, prompt_tokens] float32 on the model's device, detached.

    Raises:
        UserError: a setting outside what is accepted, no example, an empty prompt or response, a model in training
            mode, or examples of several lengths for a model that cannot be padded.
        NotFiniteError: an example's saliency is not finite; the message names the stage.
        RuntimeError: no gradient reached a stage.
    """
    _check(model, prompts, responses, reduction, target)
    modules = decoder_layers(model)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(modules):
        raise UserError(f"layers is {list(layers)}: ascending layers from 0 to {len(modules) - 1} are accepted")
    found: dict[int, torch.Tensor] = {}
    for scale in loss_scales(model.dtype):
        rows = [row for row in range(len(prompts)) if row not in found]
        labels = _labels(
            model,
            modules,
            [prompts[row] for row in rows],
            [responses[row] for row in rows],
            layers,
            reduction,
            target,
            gradient_checkpointing,
            scale,
        )
        # Each row has the first scale at which it is finite, as it has alone, whatever its batch needs.
        finite = [label.isfinite().all(dim=1) for label in labels]
        found |= {row: label for row, label, stages in zip(rows, labels, finite, strict=True) if stages.all()}
        if len(found) == len(prompts):
            return [found[row] for row in range(len(prompts))]
    row, stages = next((row, stages.tolist()) for row, stages in zip(rows, finite, strict=True) if not stages.all())
    raise NotFiniteError(row, layers[stages.index(False)], stages.index(False))


def _labels(
    model: PreTrainedModel,
    modules: nn.ModuleList,
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    layers: Sequence[int],
    reduction: Reduction,
    target: Target,
    gradient_checkpointing: bool,
    scale: float,
) -> list[torch.Tensor]:
    """What `batch_saliency` gives, finite or not, by the gradient of `scale` times what is differentiated."""
    found: dict[int, torch.Tensor] = {}  # by layer [examples, tokens]
    leaf: list[torch.Tensor] = []

    def enter(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden = args[0]
            if not leaf:
                # Weights are frozen, so nothing below this layer is on the graph: the backward pass stops here.
                leaf.append(hidden.detach().requires_grad_(torch.is_grad_enabled()))
                return (leaf[0], *args[1:])
            if hidden.requires_grad:
                # A number a token is kept, not the gradient: [tokens] for [tokens, hidden]. The hook holds the values
                # only: holding the tensor it hangs on would keep the graph alive for ever.
                values = hidden.detach()
                hidden.register_hook(lambda gradient: keep(layer, gradient, values))
            return None

        return hook

    def keep(layer: int, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        found[layer] = reduce(gradient, hidden, reduction)

    hooks = [modules[layer].register_forward_pre_hook(enter(layer)) for layer in layers]
    try:
        with _frozen(model), _checkpointing(list(modules)[layers[0] :], gradient_checkpointing):
            logits = batch_logits(model, prompts, responses)
            if not logits.requires_grad:
                raise RuntimeError("no gradient reaches the hidden states: is this called under torch.no_grad()?")
            outer = _logit_gradients(logits.detach(), responses, target, scale)
            # Where the graph ends, without the values there: they go before the backward pass fills the memory.
            end = torch.autograd.graph.get_gradient_edge(logits)
            del logits
            (gradient,) = torch.autograd.grad(end, leaf, outer, allow_unused=True)
            if gradient is not None:
                keep(layers[0], gradient, leaf[0].detach())
    finally:
        for hook in hooks:
            hook.remove()
    for stage, layer in enumerate(layers):
        if layer not in found:
            raise RuntimeError(f"no gradient reaches the states entering layer {layer} (stage {stage})")
    labels = torch.stack([found[layer] for layer in layers]) / scale  # [stages, examples, tokens]
    # Copies: whoever keeps one example's labels does not hold the batch's.
    return [labels[:, row, : len(prompt)].clone() for row, prompt in enumerate(prompts)]


def _logit_gradients(
    logits: torch.Tensor, responses: Sequence[torch.Tensor], target: Target, scale: float
) -> torch.Tensor:
    """The gradient of `scale` times what is differentiated, with respect to the logits and in their dtype.

    An example at a time: what the loss makes of logits in float32 takes several times their own bytes, and where
    prompts are short and the vocabulary is large, the logits of a batch are most of what it takes already.

    Args:
        logits: [response tokens of all examples, vocabulary], on no graph.
        responses: LongTensors [response_tokens], in the order of the logits.

    Returns:
        As `logits`.
    """

    def gradient(own: torch.Tensor, response_ids: torch.Tensor) -> torch.Tensor:
        leaf = own.detach().requires_grad_(True)
        return torch.autograd.grad(scale * _objective(leaf, response_ids, target), leaf)[0]

    if len(responses) == 1:
        return gradient(logits, responses[0])  # no copy
    # Not a list that is put together at the end, which would hold all of them twice.
    gradients = torch.empty_like(logits)
    counts = [len(response) for response in responses]
    for own, place, response in zip(logits.split(counts), gradients.split(counts), responses, strict=True):
        place.copy_(gradient(own, response))
    return gradients


def _objective(logits: torch.Tensor, response_ids: torch.Tensor, target: Target) -> torch.Tensor:
    """What is differentiated of one example; `logits` is [response_tokens, vocabulary]."""
    if target == "loss":
        return response_cross_entropy(logits, response_ids)
    own = logits.gather(1, response_ids[:, None].to(logits.device))
    return own.to(torch.promote_types(own.dtype, torch.float32)).mean()


def reduce(gradient: torch.Tensor, hidden: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """One number a token from gradient times input: the only definition of saliency in this project.

    Args:
        gradient, hidden: [..., hidden], of the same state.
        reduction: with `p = gradient * hidden`, "abs" is `|sum(p)|` (the paper's), "signed" `sum(p)`, and "l2"
            `sqrt(sum(p²))`.

    Returns:
        [...] float32; sums run in float32 or the wider dtype of the arguments.
    """
    product = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * hidden
    result: torch.Tensor = torch.linalg.vector_norm(product, dim=-1) if reduction == "l2" else product.sum(-1)
    return (result.abs() if reduction == "abs" else result).float()


def _check(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    reduction: str,
    target: str,
) -> None:
    if reduction not in get_args(Reduction):
        raise UserError(f"saliency.reduction is {reduction!r}: one of {', '.join(get_args(Reduction))} is accepted")
    if target not in get_args(Target):
        raise UserError(f"saliency.target is {target!r}: one of {', '.join(get_args(Target))} is accepted")
    if not prompts or len(prompts) != len(responses):
        raise UserError(
            f"{len(prompts)} prompts, {len(responses)} responses: as many of each, at least one, are needed"
        )
    for name, batch in (("prompt_ids", prompts), ("response_ids", responses)):
        for ids in batch:
            if ids.ndim != 1 or not len(ids):
                raise UserError(f"{name} has shape {tuple(ids.shape)}: one dimension and at least one token are needed")
    if model.training:
        raise UserError("the model is in training mode: call model.eval(), so that dropout does not blur the saliency")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight requires grad inside the block; each is as it was after it."""
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointing(layers: Sequence[nn.Module], enabled: bool) -> Iterator[None]:
    """Layers recompute their activations in the backward pass inside the block.

    The switch that transformers has works in training mode alone, in which some layers (OPT's) drop states out.
    """
    if not enabled:
        yield
        return
    # What a layer has of its own, in place of its class's: a model on several devices does.
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _recomputed(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Nothing is drawn in eval mode, so there is no state of random numbers to keep. The reentrant variant ignores
        # inputs that autograd.grad is asked for.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
