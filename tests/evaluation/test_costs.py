"""Costs by stages against FLOPs and cache bytes of whole schedules, and against times that follow a known law."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.evaluation.costs import cache_costs, flop_costs, segment_times, time_costs
from sdtp.pruning import flops, scorers
from sdtp.pruning.schedule import PruningSchedule

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
OTHER = PruningSchedule((1, 3), (0.9, 0.5), sinks=2, local=0.1, min_local=3)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen3_moe"])
@pytest.mark.parametrize("scored", [False, True])
def test_flops_are_those_of_the_schedule(family: str, scored: bool, tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = tiny_model(family).config
    scorer = scorers.Learned(32, 2, width=8, position=True) if scored else None
    costs = flop_costs(config, 50, SCHEDULE, scorer)
    for schedule in (SCHEDULE, OTHER):
        assert costs.of(schedule.surviving(50)) == flops.prefill(config, 50, schedule, scorer)
    assert costs.of([50, 50]) == flops.prefill(config, 50)  # no token scored
    # The second stage removes nothing, so that it scores nothing.
    one = PruningSchedule((1,), (0.6,), sinks=2, local=0.1, min_local=3)
    assert costs.of([30, 30]) == flops.prefill(config, 50, one, scorer)


def test_baselines_score_for_nothing(tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = tiny_model().config
    costs = flop_costs(config, 50, SCHEDULE, scorers.Recent())
    assert costs.of([30, 15]) == flops.prefill(config, 50, SCHEDULE)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_memory_is_the_cache_of_the_schedule(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = tiny_model(family).config
    costs = cache_costs(config, 50, SCHEDULE)
    for schedule in (SCHEDULE, OTHER):
        expected = flops.cache_bytes(config, 50, schedule) / flops.cache_bytes(config, 50)
        assert costs.ratio(schedule.surviving(50)) == pytest.approx(expected, rel=1e-12)


def test_time_is_what_layers_take_at_their_counts() -> None:
    # Ten seconds that no pruning saves, and a hundredth of a second a token in each of three layers.
    samples = {n: [10 + 0.03 * n, 2 * (10 + 0.03 * n)] for n in (10, 20, 50)}  # a round on a machine half as fast
    costs = time_costs(samples, 50, SCHEDULE, num_layers=4)
    whole = 10 + 0.03 * 50
    assert costs.ratio([50, 50]) == pytest.approx(1.0)
    assert costs.ratio([20, 20]) == pytest.approx((10 + 0.03 * 20) / whole)
    assert costs.ratio([20, 10]) == pytest.approx((10 + 0.01 * (20 + 20 + 10)) / whole)
    assert costs.ratio([35, 35]) == pytest.approx((10 + 0.03 * 35) / whole)  # between two lengths
    assert costs.ratio([35, 5]) == costs.ratio([35, 10])  # below the shortest


def test_time_never_falls_with_tokens() -> None:
    samples = {10: [3.0], 20: [2.0], 40: [5.0], 50: [4.0]}
    costs = time_costs(samples, 50, SCHEDULE, num_layers=4)
    assert costs.ratio([10, 10]) == costs.ratio([20, 20]) < costs.ratio([40, 40]) == costs.ratio([50, 50])


def test_layers_are_timed_at_the_lengths(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    seen: list[list[int]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    times = segment_times(model, torch.arange(3, 53)[None], 2, [10, 50], repeats=3, warmup=2)
    assert list(times) == [10, 50]
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in times.values())
    assert seen == [50, 50, 10, 10, 50, 50, 50, 50] * 5
