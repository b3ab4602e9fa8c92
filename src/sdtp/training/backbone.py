"""How the frozen model is held and run in stage 2: sharded or whole, recomputing or not, in which precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.training.masked_model import masked_attention
from sdtp.training.processes import Processes


def shard(model: PreTrainedModel, processes: Processes) -> None:
    """Spread the decoder layers' weights over the processes, in place; a layer is gathered while it computes (FSDP2).

    The main process has the weights, and sends them to the others a layer at a time: each keeps its share before the
    next layer comes, so none but the main one ever holds a whole model. Embeddings, final norm and head stay whole in
    every process: at the end of a forward, where memory peaks, they are needed whole anyway, and they are often one
    tensor. Every process must run as many forwards and backwards as the others.

    Args:
        model: frozen causal LM; with its weights on the main process, on the CPU or the processes' device, and on the
            others of the same architecture and number format, best on the meta device, for what it holds is dropped.
        processes: that share it, at least two.
    """
    with masked_attention(model):
        # transformers reads in a class's source whether its attention can be changed, and remembers; sharding gives the
        # model a class that has no source.
        pass
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    stack, layers = decoder(model), decoder_layers(model)
    inside = {module for layer in layers for module in layer.modules()}
    _take_from_main([module for module in model.modules() if module not in inside], processes)
    for layer in layers:
        _take_from_main(layer.modules(), processes)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {parameter for parameter in stack.parameters() if not isinstance(parameter, DTensor)}
    # What runs before the layers, in every forward, has them gathered ahead; no weights of its own.
    fully_shard(stack, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _take_from_main(modules: Iterable[nn.Module], processes: Processes) -> None:
    """Give these modules' own weights and buffers the main process's values, on each process's device.

    Buffers that no file holds, such as rotary frequencies, come with the rest. What is one tensor in several places, as
    tied embeddings are, stays one.
    """
    taken: dict[torch.Tensor, torch.Tensor] = {}
    for module in modules:
        own = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in own:
            if tensor not in taken:
                if processes.main:
                    value = tensor.detach().to(processes.device).contiguous()
                else:
                    value = torch.empty(tensor.shape, dtype=tensor.dtype, device=processes.device)
                processes.spread(value, 0)
                taken[tensor] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            setattr(module, name, taken[tensor])


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
