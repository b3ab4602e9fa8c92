"""What a server asks: how fast many requests are answered, a fixed number at a time, and the longest that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from sdtp.evaluation.latency import Stopwatch, Timing, timed_pass


def answer(model: PreTrainedModel, batches: Sequence[torch.Tensor], new_tokens: int, watch: Stopwatch) -> Timing:
    """Answer batches one after the other: the sums of their passes' times.

    Args:
        model: in the context of its arm.
        batches: LongTensors [batch, tokens], the requests that run together; may be none, which takes no time.
        new_tokens: tokens to generate after each prompt, >= 1; nothing stops it early.
        watch: the clock.
    """
    timings = [timed_pass(model, prompts, new_tokens, watch) for prompts in batches]
    return Timing(sum(one.prefill_s for one in timings), sum(one.end_to_end_s for one in timings), new_tokens)


def longest(fits: Callable[[int], bool], lengths: Sequence[int]) -> int | None:
    """The last of ascending lengths that fits, by bisection; None if the first does not.

    Args:
        fits: of a length; where one fits, all shorter ones do. Short ones are asked first: what is far too long
            takes long to fail.
        lengths: ascending, at least one.
    """
    low, high, stride = -1, len(lengths), 1  # the last known to fit, the first known not to
    while high - low > 1:
        # Strides that double until something does not fit, then halves.
        at = min(low + stride, high - 1) if high == len(lengths) else (low + high) // 2
        if fits(lengths[at]):
            low, stride = at, 2 * stride
        else:
            high = at
    return None if low < 0 else lengths[low]
