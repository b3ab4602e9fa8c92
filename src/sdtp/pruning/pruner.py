"""TokenPruner: attaches to an unmodified transformers model and removes prompt tokens while it prefills."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtp.pruning import store
from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.pruning.prefill import Continuation, Prefill, Trace, bound_arguments, cache_of
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import LastQuery, Learned, Saliency, Scorer

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class TokenPruner:
    """Removes the least important prompt tokens between a decoder's layers.

    Example:
        >>> with TokenPruner.from_pretrained(folder)(model) as trace:
        ...     out = model.generate(**inputs, max_new_tokens=128)
        >>> trace.kept[-1]  # the prompt tokens that reached the last stage

    Args:
        schedule: which layers prune and how many tokens survive each.
        scorer: who decides; anything with `scorers.Scorer`'s method.

    Raises:
        ValueError: a learned scorer with weights, or saliency with labels, for another number of stages.
    """

    def __init__(self, schedule: PruningSchedule, scorer: Scorer) -> None:
        if isinstance(scorer, (Learned, Saliency)) and scorer.stages != schedule.stages:
            raise ValueError(
                f"{type(scorer).__name__} was made for {scorer.stages} stages, the schedule has {schedule.stages}"
            )
        self.schedule = schedule
        self.scorer = scorer

    def with_schedule(self, schedule: PruningSchedule) -> TokenPruner:
        """The same scorer under another schedule of as many stages."""
        return TokenPruner(schedule, self.scorer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pruner.json` (schedule, scorer) and, for a learned scorer, `pruner.safetensors`.

        Raises:
            ValueError: the scorer has no form on disk (the saliency oracle, one's own class).
        """
        store.save(Path(folder), self.schedule, self.scorer)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TokenPruner:
        """Read what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other; named with the fault.
        """
        return cls(*store.load(Path(folder)))

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, protect: torch.Tensor | None = None) -> Iterator[Trace]:
        """Prune every prompt that `model` prefills inside the context; the model is as before on exit.

        A forward with no cache or an empty one is a prefill; tokens added to the cache it returns are never removed.

        Args:
            model: a causal LM of transformers (see `decoder_layers` for the supported kinds).
            protect: [batch, prompt tokens] bool over the input's columns, True at tokens that no stage may remove.

        Yields:
            The trace of the latest prefill.

        Raises:
            TypeError: the model's kind is not supported.
            ValueError: the scorer or the schedule was made for a model of another size, or a pruner is attached.
        """
        stack, layers = decoder(model), decoder_layers(model)
        self.schedule.check_fits(len(layers))
        if isinstance(self.scorer, Learned) and self.scorer.hidden_size != stack.config.hidden_size:
            raise ValueError(
                f"the scorer was trained for hidden size {self.scorer.hidden_size}, {type(model).__name__} has "
                f"{stack.config.hidden_size}"
            )
        if stack in _ATTACHED:
            raise ValueError(f"a pruner is attached to this {type(model).__name__} already: leave its context first")
        session = _Session(self, stack, layers, protect)
        _ATTACHED.add(stack)
        try:
            with contextlib.ExitStack() as hooks:
                session.attach(model, hooks)
                yield session.trace
        finally:
            _ATTACHED.discard(stack)


class _Session:
    """The hooks of one context and what they share."""

    def __init__(
        self, pruner: TokenPruner, stack: nn.Module, layers: nn.ModuleList, protect: torch.Tensor | None
    ) -> None:
        self.pruner, self.stack, self.layers, self.protect = pruner, stack, layers, protect
        self.trace = Trace()
        self.prompt_columns: int | None = None  # set while `generate` runs: how much of its first forward is prompt
        self.logits_to_keep: Any = 0
        self.forward: Prefill | Continuation | None = None

    def attach(self, model: nn.Module, hooks: contextlib.ExitStack) -> None:
        """Register every hook; `hooks` removes them."""

        def register(module: nn.Module, hook: Callable[..., Any]) -> None:
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        if model is not self.stack:
            register(model, self._before_model)
        register(self.stack, self._before_stack)
        hooks.callback(self.stack.register_forward_hook(self._after_stack, always_call=True).remove)
        stages = self.pruner.schedule.layers
        for index, layer in enumerate(self.layers):  # all: a cache may come from a pruner with earlier stages
            register(layer, functools.partial(self._before_layer, index))
        if isinstance(self.pruner.scorer, LastQuery):
            for stage in stages:
                register(self.layers[stage - 1].self_attn, self._before_attention)  # type: ignore[arg-type]
        if hasattr(model, "generate"):
            # An instance attribute hides the class's method until the context ends: only `generate` knows which part of
            # its first forward is prompt (prompt lookup and assistants append candidates).
            hooks.enter_context(_attribute(model, "generate", self._wrap_generate(model, model.generate)))  # type: ignore[arg-type]

    def _wrap_generate(self, model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}

            def setting(name: str) -> Any:
                # As `generate` resolves it: the call, then the configuration it was given, then the model's own.
                places = (
                    getattr(given.get("generation_config"), name, None),
                    getattr(model.generation_config, name, None),
                )
                return next((value for value in (given.get(name), *places) if value is not None), None)

            if setting("use_cache") is False:
                raise ValueError("generate(use_cache=False) feeds the whole sequence at every step: not under a pruner")
            if setting("prefill_chunk_size") is not None:
                raise ValueError(
                    f"prefill_chunk_size={setting('prefill_chunk_size')} is not supported under a pruner: "
                    "survivors are chosen over the whole prompt"
                )
            prompt = next(
                (given[k] for k in ("inputs_embeds", "input_ids", "inputs") if given.get(k) is not None), None
            )
            if prompt is None:
                raise ValueError("generate under a pruner needs a prompt: input_ids or inputs_embeds")
            self.prompt_columns = prompt.shape[1]
            try:
                return generate(*args, **kwargs)
            finally:
                self.prompt_columns = None

        return wrapped

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bound_arguments(module, args, kwargs)
        self.logits_to_keep = given.get("logits_to_keep", 0)
        if not _is_prefill(given):
            return
        if given.get("labels") is not None:
            raise ValueError("labels= is not supported under a pruner: logits of removed tokens do not exist")
        if isinstance(self.logits_to_keep, bool) or not isinstance(self.logits_to_keep, int):
            raise ValueError(
                f"logits_to_keep={self.logits_to_keep!r} is not supported in a pruned prefill: give a number"
            )

    def _before_stack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bound_arguments(module, args, kwargs)
        inputs = given.get("inputs_embeds")
        inputs = given.get("input_ids") if inputs is None else inputs
        if inputs is None:
            raise ValueError("the model was called without input_ids or inputs_embeds")
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            raise ValueError(
                "attention_mask under a pruner is [batch, tokens], 1 at real tokens: "
                "masks of 4 dimensions are not supported"
            )
        shape = (inputs.shape[0], inputs.shape[1])
        if not _is_prefill(given):
            self.forward = Continuation(self.stack.config, mask, shape)
            return
        for name in ("output_hidden_states", "output_attentions"):
            asked = given.get(name)
            if getattr(self.stack.config, name, False) if asked is None else asked:
                raise ValueError(f"{name}=True is not supported in a pruned prefill: layers differ in length")
        columns = shape[1] if self.prompt_columns is None else self.prompt_columns
        if shape[1] < columns:
            raise ValueError(
                f"a prompt of {columns} tokens came in parts, the first of {shape[1]}: survivors are chosen over the "
                "whole prompt, prefill it in one forward"
            )
        prefill = Prefill(
            self.pruner.schedule,
            self.pruner.scorer,
            self.layers,
            self.stack.config,
            mask,
            shape,
            columns,
            _expand_rows(self.protect, shape[0], columns),
            self.trace,
            inputs.device,
        )
        self._check_logits_to_keep(prefill)
        self.forward = prefill

    def _check_logits_to_keep(self, prefill: Prefill) -> None:
        asked, self.logits_to_keep = self.logits_to_keep, 0
        schedule = self.pruner.schedule
        for total in prefill.prompt_lengths:
            counts = [total, *schedule.surviving(total)]
            tail = schedule.protected_tail(counts[-2]) if schedule.stages else total
            if counts[-1] < total and asked - prefill.extra > tail:
                raise ValueError(
                    f"logits_to_keep={asked} reaches past the protected tail of {tail} tokens of a pruned prompt of "
                    f"{total}: raise local or min_local, or keep fewer"
                )

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward, cache = self.forward, cache_of(kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(forward, Prefill):
            hidden = forward.before_layer(index, hidden, cache)
            forward.adapt(index, hidden, kwargs, cache)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}
        if forward is not None and cache is not None:
            forward.adapt(index, hidden, kwargs, cache)
            return args, kwargs
        return None

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(self.forward, Prefill):
            given = bound_arguments(module, args, kwargs)
            self.forward.remember_query(given["hidden_states"], given["position_embeddings"])

    def _after_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self.forward = self.forward, None
        if isinstance(forward, Prefill) and output is not None:
            forward.check_scores()


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the instance attribute `name` hides the class's, or the instance's own."""
    own = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
    owner.__dict__[name] = value
    try:
        yield
    finally:
        del owner.__dict__[name]
        owner.__dict__.update(own)


def _is_prefill(given: dict[str, Any]) -> bool:
    cache = cache_of(given)
    return cache is None or cache.get_seq_length() == 0


def _expand_rows(protect: torch.Tensor | None, batch: int, columns: int) -> torch.Tensor | None:
    """The caller's mask for every row of the forward: beams and return sequences repeat the rows they came from."""
    if protect is None:
        return None
    rows = protect.shape[0] if protect.ndim == 2 else 0
    if protect.dtype != torch.bool or rows == 0 or batch % rows or protect.shape[1] != columns:
        raise ValueError(
            f"protect is {protect.dtype} of shape {tuple(protect.shape)}: a bool mask of shape [{batch}, {columns}] "
            "(batch, prompt tokens) is needed"
        )
    return protect.repeat_interleave(batch // rows, dim=0)
