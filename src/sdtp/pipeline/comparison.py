"""One prompt with and without pruning: what the model writes, where the two differ, and how long each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from sdtp.evaluation.latency import Samples, Stopwatch, Timing, arms, interleave
from sdtp.evaluation.stats import paired_ratios, quartiles
from sdtp.pruning.pruner import TokenPruner

ARMS = ("unpruned", "sdtp")
WARMUP = 1

# What is told of the passes: a name, and the seconds of one.
PARTS: Mapping[str, Callable[[Timing], float | None]] = {
    "prefill_s": lambda timing: timing.prefill_s,
    "decode_s": lambda timing: timing.decode_s,
    "seconds_per_output_token": lambda timing: timing.seconds_per_output_token,
    "end_to_end_s": lambda timing: timing.end_to_end_s,
}


@dataclasses.dataclass(frozen=True)
class Times:
    """One part of the passes, over the timed rounds; each a lower quartile, a median and an upper quartile.

    Attributes:
        unpruned, pruned: seconds.
        ratio: unpruned over pruned, of passes that ran side by side.
    """

    unpruned: tuple[float, float, float]
    pruned: tuple[float, float, float]
    ratio: tuple[float, float, float]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two generations differ, be it that one has ended; None if they are equal."""
    pairs = enumerate(zip(one, other, strict=False))
    differing = (index for index, (mine, theirs) in pairs if mine != theirs)
    return next(differing, None if len(one) == len(other) else min(len(one), len(other)))


def time_both(
    model: PreTrainedModel, pruner: TokenPruner, ids: Sequence[int], new_tokens: int, repeats: int
) -> dict[str, Times | None]:
    """The times of `PARTS`, as `evaluation.latency` measures them: interleaved, after a round of warm-up.

    Both arms generate `new_tokens`, whatever stop tokens the model has. Of one new token there is no decoding: None.

    Args:
        model: eval mode, unhooked.
        pruner: for it.
        ids: of the prompt's tokens.
        new_tokens: >= 1.
        repeats: timed rounds, >= 1.
    """
    prompt = torch.tensor([list(ids)], device=model.device)
    passes = arms(model, pruner, prompt, new_tokens, Stopwatch(prompt.device))
    samples = interleave({name: passes[name] for name in ARMS}, repeats, WARMUP)
    return {name: _times(samples, seconds) for name, seconds in PARTS.items()}


def _times(samples: Mapping[str, Samples], seconds: Callable[[Timing], float | None]) -> Times | None:
    found = {name: [seconds(timing) for timing in samples[name].warm] for name in ARMS}
    unpruned, pruned = ([value for value in found[name] if value is not None] for name in ARMS)
    if not unpruned:
        return None
    return Times(quartiles(unpruned), quartiles(pruned), paired_ratios(unpruned, pruned))
