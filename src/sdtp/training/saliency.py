"""Stage 1: how much the response depends on each prompt token, at every pruning stage of the frozen model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder_layers
from sdtp.training.response import response_cross_entropy, response_logits

Reduction = Literal["abs", "signed", "l2"]
Target = Literal["loss", "logit"]


def saliency(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    response_ids: torch.Tensor,
    layers: Sequence[int],
    reduction: Reduction = "abs",
    target: Target = "loss",
    gradient_checkpointing: bool = False,
) -> torch.Tensor:
    """Gradient times input of every prompt token at every stage, in one forward and one backward (paper §3.1, eq. 3).

    The model is not pruned. Its weights get no gradient, and it is left as it was.

    Args:
        model: causal LM in eval mode.
        prompt_ids: LongTensor [prompt_tokens].
        response_ids: LongTensor [response_tokens], at least one: what the model should answer.
        layers: the stages' decoder layers, 0-based, ascending; saliency is that of the states entering each.
        reduction: see `reduce`.
        target: what is differentiated: "loss", the mean cross-entropy of the response, or "logit", the mean logit of
            the response tokens.
        gradient_checkpointing: recompute each layer in the backward pass; the same saliency for one more forward, in a
            fraction of the memory.

    Returns:
        [stages, prompt_tokens] float32 on the model's device, detached.

    Raises:
        UserError: a setting outside what is accepted, an empty prompt or response, or a model in training mode.
        RuntimeError: no gradient reached a stage, or a stage's saliency is not finite.
    """
    _check(model, prompt_ids, response_ids, reduction, target)
    modules = decoder_layers(model)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(modules):
        raise UserError(f"layers is {list(layers)}: ascending layers from 0 to {len(modules) - 1} are accepted")
    found: dict[int, torch.Tensor] = {}
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
        found[layer] = reduce(gradient[0, : len(prompt_ids)], hidden[0, : len(prompt_ids)], reduction)

    hooks = [modules[layer].register_forward_pre_hook(enter(layer)) for layer in layers]
    try:
        with _frozen(model), _checkpointing(model, modules, gradient_checkpointing):
            logits = response_logits(model, prompt_ids, response_ids)
            if not logits.requires_grad:
                raise RuntimeError("no gradient reaches the hidden states: is this called under torch.no_grad()?")
            if target == "loss":
                objective = response_cross_entropy(logits, response_ids)
            else:
                own = logits.gather(1, response_ids[:, None].to(logits.device))
                objective = own.to(torch.promote_types(own.dtype, torch.float32)).mean()
            (gradient,) = torch.autograd.grad(objective, leaf, allow_unused=True)
            if gradient is not None:
                keep(layers[0], gradient, leaf[0].detach())
    finally:
        for hook in hooks:
            hook.remove()
    for stage, layer in enumerate(layers):
        if layer not in found:
            raise RuntimeError(f"no gradient reaches the states entering layer {layer} (stage {stage})")
        if not found[layer].isfinite().all():
            raise RuntimeError(f"saliency of layer {layer} (stage {stage}) is not finite: try a wider model.dtype")
    return torch.stack([found[layer] for layer in layers])


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
    model: PreTrainedModel, prompt_ids: torch.Tensor, response_ids: torch.Tensor, reduction: str, target: str
) -> None:
    if reduction not in get_args(Reduction):
        raise UserError(f"saliency.reduction is {reduction!r}: one of {', '.join(get_args(Reduction))} is accepted")
    if target not in get_args(Target):
        raise UserError(f"saliency.target is {target!r}: one of {', '.join(get_args(Target))} is accepted")
    for name, ids in (("prompt_ids", prompt_ids), ("response_ids", response_ids)):
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
def _checkpointing(model: PreTrainedModel, modules: nn.ModuleList, enabled: bool) -> Iterator[None]:
    """Decoder layers recompute their activations in the backward pass inside the block."""
    if not enabled:
        yield
        return
    before = model.is_activation_checkpointing
    # The reentrant variant ignores inputs that autograd.grad is asked for.
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # Enabling it also makes the embeddings require grad: layers below the first stage would be on the graph.
    model.disable_input_require_grads()
    for module in modules:
        module.training = True  # what the layer looks at; its sub-modules stay in eval mode, so dropout stays off
    try:
        yield
    finally:
        for module in modules:
            module.training = False
        if not before:
            model.activation_checkpointing_disable()
