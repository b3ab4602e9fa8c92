"""Times are told of the right arm, the ratio is unpruned over pruned, and the first difference is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.evaluation.latency import Samples, Timing
from sdtp.pipeline import comparison
from sdtp.pipeline.comparison import Times, first_difference, time_both


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([1], [], 0),
        ([5], [6], 0),
    ],
)
def test_first_difference(one: list[int], other: list[int], found: int | None) -> None:
    assert first_difference(one, other) == found


def test_times_of_three_rounds_by_hand() -> None:
    samples = {
        "unpruned": Samples(Timing(9.0, 99.0, 5), [Timing(2.0, 4.0, 5), Timing(3.0, 5.0, 5), Timing(8.0, 12.0, 5)]),
        "sdtp": Samples(Timing(9.0, 99.0, 5), [Timing(1.0, 3.0, 5), Timing(1.0, 3.0, 5), Timing(2.0, 3.0, 5)]),
    }
    assert comparison._times(samples, comparison.PARTS["prefill_s"]) == Times(
        unpruned=(2.5, 3.0, 5.5), pruned=(1.0, 1.0, 1.5), ratio=(2.5, 3.0, 3.5)
    )
    decode = comparison._times(samples, comparison.PARTS["decode_s"])
    assert decode is not None
    assert (decode.unpruned[1], decode.pruned[1], decode.ratio[1]) == (2.0, 2.0, 1.0)
    each = comparison._times(samples, comparison.PARTS["seconds_per_output_token"])
    assert each is not None
    assert each.unpruned[1] == 0.5
    whole = comparison._times(samples, comparison.PARTS["end_to_end_s"])
    assert whole is not None
    assert whole.pruned == (3.0, 3.0, 3.0)


def test_both_arms_generate_as_many_tokens_in_turn(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, order = tiny_model(), []
    pruner = TokenPruner(PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3), scorers.Recent())
    original = type(pruner).__call__

    class Noting(TokenPruner):
        @contextlib.contextmanager
        def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            order.append("pruned begins")
            with original(self, *args, **kwargs) as trace:
                yield trace
            order.append("pruned ends")

    forward = model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        order.append(str(kwargs["input_ids"].shape[1]))
        return forward(*args, **kwargs)

    model.forward = noting  # type: ignore[method-assign]
    found = time_both(model, Noting(pruner.schedule, pruner.scorer), list(range(3, 43)), new_tokens=3, repeats=2)
    passes = ["40", "1", "1"]
    assert order == [*passes, "pruned begins", *passes, "pruned ends"] * 3  # one round of them warms up
    assert all(times is not None and min(times.unpruned) > 0 and min(times.pruned) > 0 for times in found.values())


def test_one_new_token_has_no_decoding(tiny_model: Callable[..., PreTrainedModel]) -> None:
    pruner = TokenPruner(PruningSchedule((1,), (0.5,), sinks=2, local=0.1, min_local=3), scorers.Recent())
    found = time_both(tiny_model(), pruner, list(range(3, 23)), new_tokens=1, repeats=1)
    assert {part: times is None for part, times in found.items()} == {
        "prefill_s": False,
        "decode_s": True,
        "seconds_per_output_token": True,
        "end_to_end_s": False,
    }
