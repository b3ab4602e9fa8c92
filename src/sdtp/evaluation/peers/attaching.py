"""The context of a peer: prompts go through it instead of the model, what follows continues on the cache it left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from sdtp.evaluation.peers.compressed import CompressedLayer
from sdtp.evaluation.peers.trace import Held, Prefilled
from sdtp.pruning import generating
from sdtp.pruning.adapter import Architecture, architecture, bound_arguments, cache_of, tensor_parallel_group
from sdtp.pruning.overriding import overridden
from sdtp.pruning.wrappers import unwrap

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_KERNELS = ("sdpa", "eager")


@dataclasses.dataclass(frozen=True)
class PlainModel:
    """A model as it is without the peer that is attached to it.

    Attributes:
        model: the causal LM.
        architecture: its layers.
        forward: its own forward.
    """

    model: nn.Module
    architecture: Architecture
    forward: Callable[..., Any]

    def prefill(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Run it on a prompt [1, tokens] with an empty cache: logits [1, 1, vocabulary] of the token after it."""
        output = self.forward(input_ids=input_ids, cache=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[:, -1:]
        return logits


# How a peer prefills a prompt [1, tokens] into an empty cache.
PrefillWith = Callable[[PlainModel, torch.Tensor, DynamicCache], Prefilled]


def plain(model: nn.Module) -> PlainModel:
    """A model that a peer may be attached to.

    Args:
        model: a causal LM of transformers, also inside PEFT or DistributedDataParallel.

    Raises:
        TypeError: its kind is not supported, with the reason.
        ValueError: its attention kernel is not, or a peer is attached.
    """
    inner: Any = unwrap(model)
    parts = architecture(inner)
    name = type(inner).__name__
    if parts.stack is inner:
        raise TypeError(f"{name} has no language-model head: attach to the causal LM that holds it")
    for layer, window in enumerate(parts.windows):
        if window is not None:
            raise TypeError(f"{name} is not supported by peers: its layer {layer} attends to the latest {window} only")
    if parts.alibi:
        raise TypeError(f"{name} is not supported by peers: its positions are ALiBi biases")
    if tensor_parallel_group(inner) is not None:
        raise TypeError(f"{name} is not supported by peers: its heads are split over processes")
    if parts.config._attn_implementation not in _KERNELS:
        raise ValueError(
            f"attention {parts.config._attn_implementation!r} is not supported by peers: load the model with one of "
            f"{', '.join(map(repr, _KERNELS))}"
        )
    if inner in _ATTACHED:
        raise ValueError(f"a peer is attached to this {name} already: leave its context first")
    return PlainModel(inner, parts, inner.forward)


@contextlib.contextmanager
def attached(model: PlainModel, prefill: PrefillWith) -> Iterator[Held]:
    """Inside, `prefill` runs every prompt that the model is given; the model is as before on exit.

    Yields:
        What the latest prefill left in the cache.
    """
    context = _Context(model, prefill)
    _ATTACHED.add(model.model)
    try:
        with contextlib.ExitStack() as hooks:
            context.attach(hooks)
            yield context.held
    finally:
        _ATTACHED.discard(model.model)


class _Context:
    """Tells prompts from what follows them, and refuses what would be wrong.

    Args:
        plain: the model.
        prefill: the peer's.
    """

    def __init__(self, plain: PlainModel, prefill: PrefillWith) -> None:
        self.plain, self.prefill = plain, prefill
        self.held = Held()
        self.generation: generating.Generation | None = None  # set when `generate` begins, for its first forward
        self.masks: dict[tuple[int, torch.device], Any] | None = None  # of the continuation that is running

    def attach(self, hooks: contextlib.ExitStack) -> None:
        """Put the peer before the model; `hooks` takes it away."""
        model: Any = self.plain.model

        @functools.wraps(self.plain.forward)
        def forward(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            return self._forward(bound_arguments(model, args, kwargs))

        hooks.enter_context(overridden(model, "forward", forward))
        if hasattr(model, "generate"):
            hooks.enter_context(overridden(model, "generate", self._wrap_generate(model.generate)))
        for index, layer in enumerate(self.plain.architecture.layers):
            hook = functools.partial(self._before_layer, index)
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            own = getattr(self.plain.model, "generation_config", None)
            outer, self.generation = self.generation, generating.read(args, kwargs, own)
            try:
                return generate(*args, **kwargs)
            finally:
                self.generation = outer

        return wrapped

    def _forward(self, given: dict[str, Any]) -> CausalLMOutputWithPast:
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError("a peer reads the prompt from input_ids: the model was called without")
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise ValueError(f"input_ids is of shape {tuple(ids.shape)}: a peer takes one row of at least one token")
        mask = given.get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError("attention_mask hides tokens: a peer takes one row without padding")
        cache = cache_of(given)
        generation, self.generation = self.generation, None
        if cache is None or cache.get_seq_length() == 0:
            return self._prompt(given, ids, cache, generation)
        return self._continue(given, ids, cache)

    def _prompt(
        self, given: dict[str, Any], ids: torch.Tensor, cache: Any, generation: generating.Generation | None
    ) -> CausalLMOutputWithPast:
        tokens = ids.shape[1]
        if generation is not None and generation.prompt_columns != tokens:
            raise ValueError(
                f"the first forward pass of generate has {tokens} tokens and the prompt {generation.prompt_columns}: "
                "a peer takes a prompt whole and without candidates"
            )
        config = self.plain.architecture.config
        for name, neutral in (("labels", (None,)), ("return_dict", (None, True)), ("logits_to_keep", (0, 1))):
            value = given.get(name, neutral[0])
            if not isinstance(value, int | None) or value not in neutral:
                shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(
                    f"{name} is {shown} in a peer's prefill, which gives the logits of the last position alone: one of "
                    f"{', '.join(map(repr, neutral))} is accepted"
                )
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if given.get(name) or (given.get(name) is None and getattr(config, name, False)):
                raise ValueError(f"{name}=True is not supported in a peer's prefill: layers differ in length")
        if given.get("use_cache") is False:
            raise ValueError("use_cache=False is not supported by a peer: what follows a prompt continues on its cache")
        positions = given.get("position_ids")
        if positions is not None and not torch.equal(
            positions.flatten(), torch.arange(tokens, device=positions.device)
        ):
            raise ValueError("position_ids other than 0 to N-1 are not supported in a peer's prefill")
        cache = DynamicCache(config=config) if cache is None else cache
        _check_cache(cache)
        with torch.no_grad():
            done = self.prefill(self.plain, ids, cache)
        self.held.prompt_tokens, self.held.positions[:] = tokens, done.positions
        return CausalLMOutputWithPast(logits=done.logits, cache=cache)

    def _continue(self, given: dict[str, Any], ids: torch.Tensor, cache: Cache) -> CausalLMOutputWithPast:
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)[None]
        self.masks = {}
        try:
            # Callers count the tokens they gave: neither their mask nor their positions fit what the cache holds.
            output: CausalLMOutputWithPast = self.plain.forward(
                **{**given, "attention_mask": None, "position_ids": positions}
            )
            return output
        finally:
            self.masks = None

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a layer a mask of its own length: the model makes one for all, of layer 0's."""
        if self.masks is None:
            return None
        given = bound_arguments(module, args, kwargs)
        hidden, cache = given["hidden_states"], cache_of(given)
        layer = cache.layers[index]
        if not isinstance(layer, CompressedLayer):
            return None
        key = (layer.held, hidden.device)
        if key not in self.masks:
            self.masks[key] = create_causal_mask(
                config=self.plain.architecture.config,
                inputs_embeds=hidden,
                attention_mask=None,
                cache=cache,
                layer_idx=index,
            )
        changed = {**given, "attention_mask": self.masks[key]}
        return (hidden,), {name: value for name, value in changed.items() if name != "hidden_states"}


def _check_cache(cache: Any) -> None:
    """Refuse to fill a cache that cannot hold other entries in each layer."""
    plain = type(cache) is DynamicCache and not cache.offloading
    if not plain or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise TypeError(f"a {type(cache).__name__} is not supported by a peer: use a DynamicCache, not offloaded")
