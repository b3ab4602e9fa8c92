"""The hooks of one `with pruner(model)` block: they tell prefills from continuations and refuse what would be wrong."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sdtp.pruning import generating, refusals
from sdtp.pruning.adapter import Architecture, attention_of, bound_arguments, cache_of, tensor_parallel_group
from sdtp.pruning.cache import PrunedLayer, check_cache
from sdtp.pruning.continuation import Continuation
from sdtp.pruning.last_query import check_attention
from sdtp.pruning.overriding import overridden
from sdtp.pruning.prefill import Prefill, Trace
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import LastQuery, Saliency, Scorer


class _Call(threading.local):
    """What one thread's call into the model has come to; threads may share a model."""

    generation: generating.Generation | None = None  # set when `generate` begins, for its first forward
    labels: Any = None
    logits_to_keep: Any = 0
    forward: Prefill | Continuation | None = None


class Session:
    """The hooks of one context and what they share.

    Args:
        schedule: which layers prune and how many tokens survive.
        scorer: who decides.
        model: the causal LM.
        architecture: its layers.
        protect: [batch, prompt columns] bool, True at columns that no stage may remove, or None.
    """

    def __init__(
        self,
        schedule: PruningSchedule,
        scorer: Scorer,
        model: nn.Module,
        architecture: Architecture,
        protect: torch.Tensor | None,
    ) -> None:
        self.schedule, self.scorer, self.model, self.architecture = schedule, scorer, model, architecture
        self.protect = protect
        self.trace = Trace()
        self.ranks = tensor_parallel_group(model)
        self.call = _Call()

    def attach(self, hooks: contextlib.ExitStack) -> None:
        """Register every hook; `hooks` removes them.

        Raises:
            TypeError: the scorer reads attention of a kind it does not know.
        """

        def register(module: nn.Module, hook: Callable[..., Any]) -> None:
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        model, stack = self.model, self.architecture.stack
        register(stack, self._before_stack)
        hooks.callback(stack.register_forward_hook(self._after_stack, always_call=True).remove)
        for index, layer in enumerate(self.architecture.layers):  # all: a cache may know of earlier stages
            register(layer, functools.partial(self._before_layer, index))
        if isinstance(self.scorer, LastQuery):
            for stage in self.schedule.layers:
                attention: Any = attention_of(self.architecture.layers[stage - 1])
                check_attention(attention, stage - 1)
                register(attention, self._before_attention)
        # An instance attribute hides the class's method until the context ends. A caller of `forward` itself goes past
        # the model's hooks; only `generate` knows which part of its first forward is prompt (prompt lookup and
        # assistants append candidates).
        hooks.enter_context(overridden(model, "forward", self._wrap_forward(model.forward)))
        if hasattr(model, "generate"):
            hooks.enter_context(overridden(model, "generate", self._wrap_generate(model.generate)))  # type: ignore[arg-type]
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(model, name):
                hooks.enter_context(overridden(model, name, functools.partial(refusals.refuse_batching, name)))

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            generation = generating.read(args, kwargs, getattr(self.model, "generation_config", None))
            refusals.check_whole_prompt(cache_of(kwargs), generation, kwargs.get("attention_mask"))
            # Restored, not cleared: a model may be its own assistant and generate while it generates.
            outer, self.call.generation = self.call.generation, generation
            try:
                return generate(*args, **kwargs)
            finally:
                self.call.generation = outer

        return wrapped

    def _wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = bound_arguments(self.model, args, kwargs)
            self.call.labels, self.call.logits_to_keep = given.get("labels"), given.get("logits_to_keep", 0)
            return forward(*args, **kwargs)

        return wrapped

    def _before_stack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Taken up here: what is asked of this forward is not asked of the next, and what else the model prefills while
        # it generates (for a logits processor, say) is prompt throughout.
        labels, self.call.labels = self.call.labels, None
        logits_to_keep, self.call.logits_to_keep = self.call.logits_to_keep, 0
        generation, self.call.generation = self.call.generation, None
        given = bound_arguments(module, args, kwargs)
        inputs = given.get("inputs_embeds")
        inputs = given.get("input_ids") if inputs is None else inputs
        if inputs is None:
            raise ValueError("the model was called without input_ids or inputs_embeds")
        refusals.check_packed(given)
        shape = (inputs.shape[0], inputs.shape[1])
        cache = cache_of(given)
        if cache is not None:
            check_cache(cache, len(self.architecture.layers))
        held = 0 if cache is None else cache.get_seq_length()
        mask = given.get("attention_mask")
        refusals.check_mask(mask, shape, held)
        if held > 0:
            refusals.check_rows(cache.layers[0], shape[0], mask)
            survivors = (i for i, one in enumerate(cache.layers) if isinstance(one, PrunedLayer) and one.stage >= 0)
            refusals.check_flash(self.architecture, survivors, held + shape[1])
            continuation = Continuation(self.architecture, mask, shape)
            first = cache.layers[0]
            # Most steps of decoding need nothing: a step takes the model as long to launch as to run, so that work at
            # every layer would show.
            plain = isinstance(first, PrunedLayer) and first.takes_unprepared(shape[1]) and continuation.mask is None
            self.call.forward = None if plain else continuation
            return
        if labels is not None:
            raise ValueError("labels= is not supported under a pruner: logits of removed tokens do not exist")
        prefill = self._prefill(given, mask, shape, inputs.device, generation)
        refusals.check_logits_to_keep(self.schedule, prefill, logits_to_keep)
        self.call.forward = prefill

    def _prefill(
        self,
        given: dict[str, Any],
        mask: torch.Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        generation: generating.Generation | None,
    ) -> Prefill:
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            asked = given.get(name)
            if getattr(self.architecture.config, name, False) if asked is None else asked:
                raise ValueError(f"{name}=True is not supported in a pruned prefill: layers differ in length")
        if isinstance(self.scorer, LastQuery):
            refusals.check_keys_at_hand(self.architecture, self.schedule, given, shape[1])
        columns = shape[1] if generation is None else generation.prompt_columns
        if shape[1] < columns:
            raise ValueError(
                f"a prompt of {columns} tokens came in parts, the first of {shape[1]}: survivors are chosen over the "
                "whole prompt, prefill it in one forward"
            )
        prefill = Prefill(
            self.schedule,
            self.scorer,
            self.architecture,
            mask,
            shape,
            columns,
            _expand_rows(self.protect, shape[0] if generation is None else generation.prompt_rows, shape[0], columns),
            device,
            self.ranks,
            given.get("position_ids"),
            generation is not None and generation.drafts,
        )
        if generation is not None and prefill.right_padded:
            raise ValueError("a prompt ends in padding: generate goes on from the last column, pad on the left")
        if isinstance(self.scorer, Saliency):
            self.scorer.check(shape[0], max(prefill.prompt_lengths))
        pruned = range(prefill.first_pruned(), len(self.architecture.layers))
        refusals.check_flash(self.architecture, pruned, shape[1])
        return prefill

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self.call.forward
        if forward is None:
            return None
        kwargs = bound_arguments(module, args, kwargs)
        cache = cache_of(kwargs)
        hidden = kwargs["hidden_states"]
        if isinstance(forward, Prefill):
            hidden = forward.before_layer(index, hidden, cache)
            changed = forward.adapt(index, hidden, kwargs, cache)
        elif cache is not None:
            changed = forward.adapt(index, hidden, kwargs, cache)
        else:
            return None
        return (hidden,), {name: value for name, value in changed.items() if name != "hidden_states"}

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(self.call.forward, Prefill):
            given = bound_arguments(module, args, kwargs)
            self.call.forward.remember_query(given["hidden_states"], given["position_embeddings"])

    def _after_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self.call.forward = self.call.forward, None
        if isinstance(forward, Prefill):
            if output is None:
                self.trace.tell([], [])
            else:
                forward.finish(self.trace)


def _expand_rows(protect: torch.Tensor | None, rows: int, batch: int, columns: int) -> torch.Tensor | None:
    """The caller's mask for every row of the forward: beams and return sequences repeat the rows they came from."""
    if protect is None:
        return None
    if protect.dtype != torch.bool or tuple(protect.shape) != (rows, columns):
        raise ValueError(
            f"protect is {protect.dtype} of shape {tuple(protect.shape)}: a bool mask of shape [{rows}, {columns}] "
            "(batch, prompt tokens) is needed"
        )
    return protect.repeat_interleave(batch // rows, dim=0)
