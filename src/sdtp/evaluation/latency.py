"""Time of prefill and decode, unpruned, pruned and at the length bound, measured side by side in one process.

Every arm runs the same greedy loop over the same model; they differ in the context they run in alone. The loop knows no
stop token, so unpruned and pruned arms generate the same number of tokens whatever stop ids the model has; the
length-bound arm stops after prefill, the one part it is compared by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.scorer import StageView

Context = Callable[[], contextlib.AbstractContextManager[Any]]
# What a method runs under: a `TokenPruner` or a peer.
Attached = Callable[[PreTrainedModel], contextlib.AbstractContextManager[Any]]
FirstPass = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One pass over one prompt, or over several that run together.

    Attributes:
        prefill_s: seconds to the first new token, scoring and removal included.
        end_to_end_s: seconds to the last new token, in the same pass.
        new_tokens: tokens generated after each prompt, >= 1; the first one comes with prefill.
    """

    prefill_s: float
    end_to_end_s: float
    new_tokens: int

    @property
    def decode_s(self) -> float | None:
        """Seconds of the `new_tokens - 1` decode steps; None if there are none."""
        return self.end_to_end_s - self.prefill_s if self.new_tokens > 1 else None

    @property
    def seconds_per_output_token(self) -> float | None:
        """Seconds of one decode step: the first token belongs to prefill. None if there are no decode steps."""
        decode_s = self.decode_s
        return None if decode_s is None else decode_s / (self.new_tokens - 1)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The passes of one arm.

    Attributes:
        cold: the very first pass, which pays for allocation and lazy initialisation; in no statistic.
        warm: the timed passes, in the order they ran: the i-th of every arm ran side by side.
    """

    cold: Timing
    warm: list[Timing]


class Stopwatch:
    """A clock that waits for queued work: one synchronise right before each reading on CUDA, none on the CPU.

    Args:
        device: where the timed work runs.
        clock: seconds, monotonic.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock

    def read(self) -> float:
        """Seconds since an arbitrary start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def prefill(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Run prompts [batch, tokens]; the first new tokens [batch, 1] and the cache. Logits of one position only."""
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output.cache


def decode(model: PreTrainedModel, token: torch.Tensor, cache: Cache, new_tokens: int) -> torch.Tensor:
    """Continue greedily after `prefill`; all new tokens [batch, new_tokens], `token` first. Nothing stops it early."""
    tokens = [token]
    while len(tokens) < new_tokens:
        output = model(input_ids=tokens[-1], cache=cache, use_cache=True, logits_to_keep=1)
        tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


def timed_pass(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, watch: Stopwatch) -> Timing:
    """Prefill, then decode on that prefill's cache: three readings of the clock.

    Args:
        model: in the context of its arm.
        prompt: LongTensor [batch, tokens], one prompt or several of one length.
        new_tokens: tokens to generate after each, >= 1.
        watch: the clock.

    Raises:
        RuntimeError: another number of tokens came out, so that the pass cannot be compared with others.
    """
    with torch.inference_mode():
        start = watch.read()
        token, cache = prefill(model, prompt)
        first = watch.read()
        tokens = decode(model, token, cache, new_tokens)
        end = watch.read() if new_tokens > 1 else first
    if tokens.shape != (expected := (prompt.shape[0], new_tokens)):
        raise RuntimeError(f"{tuple(tokens.shape)} tokens were generated where {expected} were asked for")
    return Timing(first - start, end - start, new_tokens)


def interleave(
    passes: Mapping[str, Callable[[], Timing]],
    repeats: int,
    warmup: int,
    first_pass: FirstPass | None = None,
    *,
    progress: bool = True,
) -> dict[str, Samples]:
    """Run the arms in turn, A B C A B C, so that what changes on the machine meets all of them alike.

    Args:
        passes: one pass of each arm, by name. They have the shapes that are timed, in warm-up too.
        repeats: timed rounds, >= 1.
        warmup: rounds before them, >= 1; the first gives the cold figures.
        first_pass: `first_pass(name)` is a context for an arm's very first pass, which is in no statistic.
        progress: whether to show a bar; of several processes one does.

    Raises:
        ValueError: `repeats` or `warmup` is below 1.
    """
    for name, count in (("repeats", repeats), ("warmup", warmup)):
        if count < 1:
            raise ValueError(f"{name} is {count}: at least one round is needed")
    rounds: list[dict[str, Timing]] = []
    for _ in tqdm(range(warmup + repeats), desc="timing", unit="round", leave=False, disable=not progress):
        timings = {}
        for name, run in passes.items():
            with contextlib.nullcontext() if rounds or first_pass is None else first_pass(name):
                timings[name] = run()
        rounds.append(timings)
    return {name: Samples(rounds[0][name], [r[name] for r in rounds[warmup:]]) for name in passes}


@contextlib.contextmanager
def cut_to_lengths(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """The length bound: inside, each decoder layer runs on the first `lengths[layer]` tokens of its input.

    The model's own layers at a schedule's token counts, with nothing spent on choosing tokens: no scoring, no sorting,
    no gathering, only views. What is computed is of no use, what it costs is the least a schedule can cost on this
    hardware. Prefill of one unpadded prompt only.

    Args:
        model: a causal LM, unhooked.
        lengths: tokens of each layer, never ascending (`PruningSchedule.layer_lengths`).
    """
    layers = decoder_layers(model)
    handles = [
        layer.register_forward_pre_hook(_cutter(length), with_kwargs=True)
        for layer, length in zip(layers, lengths, strict=True)
        if length < lengths[0]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cutter(length: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """A layer's pre-hook that cuts states, positions, rotary tables, biases and mask to the first `length` tokens."""

    def tokens(value: Any) -> Any:
        """[batch, tokens, ...], or a tuple of such, cut; None stays."""
        if isinstance(value, tuple):
            return tuple(map(tokens, value))
        return None if value is None else value[:, :length]

    def keys(value: Any) -> Any:
        """[..., queries or 1, keys], cut; None, of kernels that need no mask, stays."""
        return None if value is None else value[..., :length, :length]

    cuts = {"position_ids": tokens, "position_embeddings": tokens, "attention_mask": keys, "alibi": keys}

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        changed = {name: cuts[name](value) if name in cuts else value for name, value in kwargs.items()}
        return (args[0][:, :length], *args[1:]), changed

    return cut


def arms(
    model: PreTrainedModel, pruner: TokenPruner, prompt: torch.Tensor, new_tokens: int, watch: Stopwatch
) -> dict[str, Callable[[], Timing]]:
    """One pass each of `unpruned`, `sdtp` and `ideal` (the length bound; prefill only) on one prompt, for `interleave`.

    Args:
        model: eval mode, unhooked.
        pruner: what the `sdtp` arm runs under; it is attached and removed outside the timed part.
        prompt: LongTensor [1, tokens] on the model's device.
        new_tokens: tokens each pass generates, >= 1.
        watch: the clock.
    """
    lengths = pruner.schedule.layer_lengths(prompt.shape[1], len(decoder_layers(model)))
    return {
        **methods_arms(model, {"sdtp": pruner}, prompt, new_tokens, watch),
        "ideal": _arm(model, lambda: cut_to_lengths(model, lengths), prompt, 1, watch),
    }


def methods_arms(
    model: PreTrainedModel, methods: Mapping[str, Attached], prompt: torch.Tensor, new_tokens: int, watch: Stopwatch
) -> dict[str, Callable[[], Timing]]:
    """One pass of `unpruned`, without any hook, and one of each method on one prompt, for `interleave`.

    Args:
        model: eval mode, unhooked.
        methods: name -> a pruner or a peer, which is attached and removed outside the timed part.
        prompt: LongTensor [1, tokens] on the model's device.
        new_tokens: tokens each pass generates, >= 1.
        watch: the clock.
    """
    contexts: dict[str, Context] = {"unpruned": contextlib.nullcontext}
    contexts |= {name: functools.partial(method, model) for name, method in methods.items()}
    return {name: _arm(model, context, prompt, new_tokens, watch) for name, context in contexts.items()}


def scoring_arm(
    model: PreTrainedModel, pruner: TokenPruner, prompt_tokens: int, watch: Stopwatch
) -> Callable[[], Timing]:
    """A pass of a pruner's scorer alone, for `interleave`: what deciding costs, without sorting, gathering and hooks.

    It scores random states, as many as enter each stage that removes some of the prompt; its seconds are booked as
    prefill, which they are a part of.

    Args:
        model: whose width and number format the states have.
        pruner: with any scorer but `LastQuery`, which has nothing to score without a layer's attention.
        prompt_tokens: of the prompt.
        watch: the clock.
    """
    schedule = pruner.schedule
    states = torch.randn(1, prompt_tokens, model.config.hidden_size, dtype=model.dtype, device=watch.device)
    positions = torch.arange(prompt_tokens, device=watch.device)[None]
    lengths = torch.full((1,), prompt_tokens, device=watch.device)
    counts = itertools.pairwise([prompt_tokens, *schedule.surviving(prompt_tokens)])
    views = [
        StageView(stage, layer, states[:, -entering:], positions[:, -entering:], lengths, _no_attention)
        for stage, (layer, (entering, left)) in enumerate(zip(schedule.layers, counts, strict=True))
        if left < entering
    ]

    def run() -> Timing:
        with torch.inference_mode():
            start = watch.read()
            for view in views:
                pruner.scorer.score(view)
            seconds = watch.read() - start
        return Timing(seconds, seconds, 1)

    return run


def _no_attention() -> torch.Tensor:
    raise TypeError("a scorer that reads the attention of the layer before it cannot be timed alone")


def _arm(
    model: PreTrainedModel, context: Context, prompt: torch.Tensor, new_tokens: int, watch: Stopwatch
) -> Callable[[], Timing]:
    def run() -> Timing:
        with context():
            return timed_pass(model, prompt, new_tokens, watch)

    return run


def compare(
    model: PreTrainedModel,
    pruner: TokenPruner,
    prompt: torch.Tensor,
    new_tokens: int,
    repeats: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    first_pass: FirstPass | None = None,
) -> dict[str, Samples]:
    """Time the `arms` of one pruner on one prompt, interleaved.

    Args:
        model, pruner, prompt, new_tokens: see `arms`.
        repeats: timed rounds.
        warmup: rounds before them.
        clock: seconds, monotonic.
        first_pass: see `interleave`.
    """
    passes = arms(model, pruner, prompt, new_tokens, Stopwatch(prompt.device, clock))
    return interleave(passes, repeats, warmup, first_pass)


def prefill_tokens_per_second(batch: int, prompt_tokens: int, prefill_s: float) -> float:
    """Prompt tokens per second: all rows' prompt tokens over the time of their common prefill."""
    return batch * prompt_tokens / prefill_s
