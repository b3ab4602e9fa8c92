"""Many requests are the sum of their batches; the longest that fits is found, in few tries."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.evaluation.latency import Stopwatch, Timing, timed_pass
from sdtp.evaluation.serving import answer, longest
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

CPU = torch.device("cpu")


def test_batches_add_up(tiny_model: Callable[..., PreTrainedModel]) -> None:
    # Read at the start, after prefill and at the end of each of two batches.
    readings = itertools.chain([0.0, 2.0, 5.0, 100.0, 103.0, 107.0])
    watch = Stopwatch(CPU, lambda: next(readings))
    prompts = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    timing = answer(tiny_model(), list(prompts.split(2)), 3, watch)
    assert timing == Timing(prefill_s=5.0, end_to_end_s=12.0, new_tokens=3)
    assert next(readings, None) is None


def test_no_batch_takes_no_time(tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert answer(tiny_model(), [], 3, Stopwatch(CPU)) == Timing(0.0, 0.0, 3)


def test_rows_of_a_timed_batch_run_together_and_are_pruned_each(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, seen = tiny_model(), []
    hook = model.model.layers[-1].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    prompts = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    with TokenPruner(PruningSchedule((2,), (0.5,), sinks=1, min_local=2), scorers.HiddenNorm())(model):
        timed_pass(model, prompts, 3, Stopwatch(CPU))
    hook.remove()
    assert seen == [(2, 10), (2, 1), (2, 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
def test_the_longest_that_fits(count: int) -> None:
    lengths = [10 * (n + 1) for n in range(count)]
    for limit in range(0, 10 * count + 20, 5):
        asked: list[int] = []

        def fits(length: int, asked: list[int] = asked, limit: int = limit) -> bool:
            asked.append(length)
            return length <= limit

        found = longest(fits, lengths)
        assert found == max((length for length in lengths if length <= limit), default=None)
        assert len(asked) == len(set(asked)) <= 2 * count.bit_length()
        # Never more than about twice as far as what is known to fit, so that no try is hopeless.
        for number, length in enumerate(asked):
            known = max((one for one in asked[:number] if one <= limit), default=0)
            assert length <= 2 * known + 20
