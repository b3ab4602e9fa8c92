"""The speed of a prompt that is shortened first: what shortening takes counts."""

from __future__ import annotations

from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.paper.shortened import shortened_speeds, speed


def timed(tokens: int, method: str, prefill: list[float], decode: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "prompt_tokens": tokens,
        "prefill_s": prefill,
        "end_to_end_s": [seconds + decode for seconds in prefill],
        **more,
    }


def test_what_shortening_takes_counts_in_both_speedups() -> None:
    unpruned = timed(100, "unpruned", [0.100, 0.100, 0.200], 0.05)
    # 30 ms and a prefill of 100 -> 60 ms are 1.11 times, not 1.67; its own outlier is in no pair.
    own = timed(100, "llmlingua2", [0.060, 0.060, 0.060], 0.05, shortening_s=[0.030, 0.029, 9.0])
    found = speed(unpruned, own)
    assert found.prefill == pytest.approx(0.1 / 0.09)
    assert found.end_to_end == pytest.approx(0.15 / 0.14)
    assert (found.shortening_s, found.timed_tokens) == (0.03, 100)


def test_speed_of_a_keep_ratio_is_that_of_its_longest_prompt() -> None:
    rows = [
        timed(length, method, [seconds], 0.0, shortening_s=[0.5])
        for length, own in ((800, 4.5), (200, 1.5))
        for method, seconds in (("unpruned", 10.0), ("llmlingua2", own))
    ]
    found = shortened_speeds([{"keep_ratio": 0.9, "rows": rows}, {"keep_ratio": 0.8, "rows": rows[2:]}])
    assert {arm: own.prefill for arm, own in found.items()} == {("llmlingua2", 0.9): 2.0, ("llmlingua2", 0.8): 5.0}
    with pytest.raises(
        UserError, match=r"timings of llmlingua2 at keep ratio 0\.9: rows of \['unpruned'\] at 800 tokens"
    ):
        shortened_speeds([{"keep_ratio": 0.9, "rows": [rows[0], *rows[2:]]}])
