"""How the frozen model is held and run in stage 2: sharded or whole, recomputing or not, in which precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.training.masked_model import masked_attention
from sdtp.training.processes import Processes


def shard(model: PreTrainedModel, processes: Processes) -> None:
    """Spread the decoder layers' weights over the processes, in place; a layer is gathered while it computes (FSDP2).

    Embeddings, final norm and head stay whole in every process: at the end of a forward, where memory peaks, they are
    needed whole anyway, and they are often one tensor. Every process must run as many forwards and backwards as the
    others.

    Args:
        model: frozen causal LM, alike on every process, on the CPU or the processes' device; its layers' weights move
            to that device one layer at a time.
        processes: that share it.
    """
    with masked_attention(model):
        # transformers reads in a class's source whether its attention can be changed, and remembers; sharding gives the
        # model a class that has no source.
        pass
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    stack, layers = decoder(model), decoder_layers(model)
    sharded = {parameter for layer in layers for parameter in layer.parameters()}
    whole = {parameter for parameter in stack.parameters() if parameter not in sharded}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # What runs before the layers, in every forward, has them gathered ahead; no weights of its own.
    fully_shard(stack, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(processes.device)  # type: ignore[arg-type]  # transformers declares a method of its own here


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether `shard` was here."""
    return isinstance(decoder(model), FSDPModule)


@contextmanager
def running(model: PreTrainedModel, first_stage: int, *, autocast: bool, recompute: bool) -> Iterator[None]:
    """The model runs as asked for inside the block, and is as it was after it.

    Args:
        model: frozen causal LM.
        first_stage: the decoder layer of the first stage, below which no gradient is needed.
        autocast: matrix products in bfloat16, whatever the weights' dtype.
        recompute: forget what each decoder layer computed, and compute it again in the backward pass: the same
            gradients for one more forward, in a fraction of the memory.
    """
    layers = decoder_layers(model)
    hooks = []
    own = {layer: layer.forward for layer in layers[first_stage:] if "forward" in vars(layer)}
    if is_sharded(model):
        # Which layers a backward pass goes through depends on the example, on where its first token is masked; but
        # the processes gather a layer's weights together or not at all.
        hooks.append(layers[first_stage].register_forward_pre_hook(_on_the_graph))
    try:
        if recompute:
            for layer in layers[first_stage:]:
                # The forward and not the call: hooks, which score and choose, must not run again.
                layer.forward = _recomputed(model, layer.forward)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        if recompute:
            for layer in layers[first_stage:]:
                del layer.forward  # over the class's
                vars(layer).update({"forward": own[layer]} if layer in own else {})


def _recomputed(model: PreTrainedModel, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # with its signature, by which a model's kind is known
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The backward pass comes when the masking policy has left the model: what is computed again is still masked.
        contexts = nullcontext(), masked_attention(model)
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts, **kwargs
        )

    return run


def _on_the_graph(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = args[0]
    return (hidden.detach().requires_grad_(torch.is_grad_enabled()), *args[1:])
