"""How fast a prompt is answered that LLMLingua-2 shortens first: its own time counts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sdtp.errors import UserError
from sdtp.evaluation.stats import paired_ratios

LLMLINGUA = "llmlingua2"


class Speed(NamedTuple):
    """Measured speedups of a method, and what it takes before the model runs.

    Attributes:
        prefill, end_to_end: unpruned time over the method's, whatever it does before the model runs included.
        shortening_s: seconds of that; None where it does nothing before.
        timed_tokens: of the whole prompt that both ran on.
    """

    prefill: float
    end_to_end: float
    shortening_s: float | None = None
    timed_tokens: int | None = None


def speed(unpruned: Mapping[str, Any], row: Mapping[str, Any]) -> Speed:
    """What LLMLingua-2 gains at one prompt length: medians of paired ratios.

    It runs in a process of its own, so that only the model's own time is paired; the median of LLMLingua-2's is added
    to each.

    Args:
        unpruned, row: of the whole and of the shortened prompt, as `sdtp time-shortened` writes them.
    """
    shortening = statistics.median(row["shortening_s"])
    prefill, end_to_end = (
        paired_ratios(unpruned[name], [shortening + seconds for seconds in row[name]])[1]
        for name in ("prefill_s", "end_to_end_s")
    )
    return Speed(prefill, end_to_end, shortening, int(unpruned["prompt_tokens"]))


def shortened_speeds(timings: Iterable[Mapping[str, Any]]) -> dict[tuple[str, float], Speed]:
    """`speed` of each keep ratio, at the longest prompt.

    Args:
        timings: the objects of `llmlingua/speed-*.json`.

    Raises:
        UserError: the longest prompt does not have a row of both.
    """
    found = {}
    for content in timings:
        longest = max(row["prompt_tokens"] for row in content["rows"])
        rows = {row["method"]: row for row in content["rows"] if row["prompt_tokens"] == longest}
        if rows.keys() != {"unpruned", LLMLINGUA}:
            raise UserError(
                f"timings of {LLMLINGUA} at keep ratio {content['keep_ratio']}: rows of {sorted(rows)} at {longest} "
                f"tokens; unpruned and {LLMLINGUA} are needed"
            )
        found[LLMLINGUA, content["keep_ratio"]] = speed(rows["unpruned"], rows[LLMLINGUA])
    return found
