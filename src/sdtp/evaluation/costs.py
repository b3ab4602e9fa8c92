"""What a stage's token count costs: in FLOPs, in bytes of the KV cache, or in time measured on this machine."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from sdtp.evaluation.latency import Samples, Stopwatch, Timing, cut_to_lengths, interleave, timed_pass
from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.flops import Dimensions
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned, Scorer


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a prompt of `prompt_tokens` costs by the tokens that each stage leaves, in any unit.

    Attributes:
        prompt_tokens: `N`.
        stage: `stage(s, n)`, cost of the layers from the s-th stage (from 0) to the next one, or to the end, on n
            tokens; ascending in n.
        scoring: `scoring(n)`, cost of scoring n tokens at a stage that removes some.
        fixed: cost of everything that no stage changes.
    """

    prompt_tokens: int
    stage: Callable[[int, int], float]
    scoring: Callable[[int], float]
    fixed: float

    def of(self, counts: Sequence[int]) -> float:
        """Cost of a prefill whose stages leave `counts` tokens."""
        entering = [self.prompt_tokens, *counts[:-1]]
        # Where nothing is to be removed nothing is scored.
        scoring = sum(self.scoring(n) for n, left in zip(entering, counts, strict=True) if left < n)
        return self.fixed + scoring + sum(self.stage(s, n) for s, n in enumerate(counts))

    def ratio(self, counts: Sequence[int]) -> float:
        """The same as a share of the unpruned prefill's."""
        return self.of(counts) / self.of([self.prompt_tokens] * len(counts))


def flop_costs(config: Any, prompt_tokens: int, schedule: PruningSchedule, scorer: Scorer | None) -> Costs:
    """Operations of a prefill as `flops.prefill` counts them.

    Args:
        config: of the model; see `flops.Dimensions.of` for what is refused.
        prompt_tokens: `N` >= 1.
        schedule: whose stages are chosen for.
        scorer: a learned one's operations are counted; the baselines need next to nothing.
    """
    size = Dimensions.of(config)

    def layer(index: int, tokens: int) -> float:
        one = size.layers[index]
        return one.operations(tokens, one.pairs(tokens))

    def scoring(tokens: int) -> float:
        return 2.0 * scorer.multiply_adds(tokens) if isinstance(scorer, Learned) else 0.0

    return _by_layer(prompt_tokens, schedule, len(size.layers), layer, scoring, rest=2.0 * size.head)


def cache_costs(config: Any, prompt_tokens: int, schedule: PruningSchedule) -> Costs:
    """Values in the KV cache after a prefill, as `flops.cache_bytes` counts them; arguments as of `flop_costs`."""
    size = Dimensions.of(config)

    def layer(index: int, tokens: int) -> float:
        one = size.layers[index]
        return one.held(tokens) * one.cached

    return _by_layer(prompt_tokens, schedule, len(size.layers), layer, lambda tokens: 0.0, rest=0.0)


def time_costs(
    samples: dict[int, Sequence[float]], prompt_tokens: int, schedule: PruningSchedule, num_layers: int
) -> Costs:
    """Shares of the unpruned prefill's time, by the length bound: what layers take at their token counts.

    Scoring, sorting and gathering are not in it. Layers from the first stage on are taken to be alike.

    Args:
        samples: tokens that all layers from the first stage on ran on -> seconds of each round, `prompt_tokens` among
            them (`segment_times` measures them). Between them times are interpolated, outside they stay.
        prompt_tokens: `N`.
        schedule: whose stages are chosen for.
        num_layers: decoder layers of the model.
    """
    lengths = sorted(samples)
    # Ratios of one round's times are those of one state of the machine; a median of times is not.
    whole = samples[prompt_tokens]
    ratios = [statistics.median(a / b for a, b in zip(samples[n], whole, strict=True)) for n in lengths]
    rising = isotonic_regression(ratios).x
    pruned = num_layers - schedule.layers[0]

    def layer(index: int, tokens: int) -> float:
        if index < schedule.layers[0]:
            return 0.0
        return float(np.interp(tokens, lengths, rising) - rising[0]) / pruned

    return _by_layer(prompt_tokens, schedule, num_layers, layer, lambda tokens: 0.0, rest=float(rising[0]))


def _by_layer(
    prompt_tokens: int,
    schedule: PruningSchedule,
    num_layers: int,
    layer: Callable[[int, int], float],
    scoring: Callable[[int], float],
    rest: float,
) -> Costs:
    """Costs of stages from those of layers; `rest` is what no layer costs."""
    schedule.check_fits(num_layers)
    ends = [*schedule.layers[1:], num_layers]
    before = sum(layer(index, prompt_tokens) for index in range(schedule.layers[0]))

    def stage(number: int, tokens: int) -> float:
        return sum(layer(index, tokens) for index in range(schedule.layers[number], ends[number]))

    return Costs(prompt_tokens, stage, scoring, rest + before)


def segment_times(
    model: PreTrainedModel, prompt: torch.Tensor, first: int, lengths: Sequence[int], repeats: int, warmup: int = 1
) -> dict[int, Sequence[float]]:
    """Seconds of the unpruned model's prefill with all layers from `first` on cut to each length, interleaved.

    Args:
        model: eval mode, unhooked.
        prompt: LongTensor [1, tokens] on the model's device.
        first: the first layer that is cut.
        lengths: tokens, each at most those of the prompt, which is among them.
        repeats, warmup: rounds, see `latency.interleave`.

    Returns:
        Length -> seconds of each round.
    """
    layers, tokens = len(decoder_layers(model)), prompt.shape[1]
    watch = Stopwatch(prompt.device)

    def arm(length: int) -> Callable[[], Timing]:
        def run() -> Timing:
            with cut_to_lengths(model, [tokens] * first + [length] * (layers - first)):
                return timed_pass(model, prompt, 1, watch)

        return run

    found: dict[str, Samples] = interleave({str(length): arm(length) for length in lengths}, repeats, warmup)
    return {int(length): [timing.prefill_s for timing in samples.warm] for length, samples in found.items()}
