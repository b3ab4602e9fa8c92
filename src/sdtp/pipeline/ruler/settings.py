"""What the tasks can be made to ask, and the ranges that are accepted."""

from __future__ import annotations

from dataclasses import dataclass

from sdtp.errors import UserError
from sdtp.pipeline.config import Block
from sdtp.pipeline.facts import TEST

TASKS = (
    "single",
    "multi_key",
    "multi_value",
    "multi_query",
    "variables",
    "common_words",
    "frequent_words",
    "qa",
)
# More would be lists of facts rather than text with facts in it, and chains longer than the paper's longest.
_MOST = 64
# More than the longest prompts hold.
_MOST_PASSAGES = 100_000


@dataclass(frozen=True, repr=False)
class RulerSettings(Block):
    """How hard each task is.

    Attributes:
        depths: where `single` plants its fact, in turn: 0 before the text, 1 after it.
        keys: facts of `multi_key`, of which one is asked for (RULER: 4).
        values: facts of `multi_value`, all of one key (RULER: 4).
        queries: facts of `multi_query`, all asked for (RULER: 4).
        chains: chains of `variables`, of which one is asked for (RULER: 1).
        hops: assignments of a variable to the next in each of them, so that it has one name more (RULER: 4).
        common_words: words that `common_words` asks for (RULER: 10).
        common_repeats: how often each of them stands in the list (RULER: 30).
        rare_repeats: how often each other word does (RULER: 3).
        passages: most passages of `qa` besides the one with the answer; as many as fit are used.
    """

    depths: tuple[float, ...]
    keys: int
    values: int
    queries: int
    chains: int
    hops: int
    common_words: int
    common_repeats: int
    rare_repeats: int
    passages: int


def check(settings: RulerSettings, task: str) -> None:
    """Raise UserError for a task that does not exist, or a setting of its own outside the accepted range."""
    if task not in TASKS:
        raise UserError(f"ruler.tasks: {task!r} is no task; accepted: {', '.join(TASKS)}")
    ranges = {
        "multi_key": {"keys": (2, len(TEST.entities))},
        "multi_value": {"values": (2, _MOST)},
        "multi_query": {"queries": (2, len(TEST.entities))},
        "variables": {"chains": (1, _MOST), "hops": (1, _MOST)},
        "common_words": {"common_words": (1, _MOST), "rare_repeats": (1, _MOST)},
        "qa": {"passages": (1, _MOST_PASSAGES)},
    }
    for name, (low, high) in ranges.get(task, {}).items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise UserError(f"ruler.{name}: {value} is not in {low}..{high}")
    if task == "common_words" and settings.common_repeats <= settings.rare_repeats:
        raise UserError(
            f"ruler.common_repeats: {settings.common_repeats} is not above {settings.rare_repeats}, "
            "which is ruler.rare_repeats"
        )
    if task == "single" and not (settings.depths and all(0.0 <= depth <= 1.0 for depth in settings.depths)):
        raise UserError(f"ruler.depths: {list(settings.depths)}; at least one is needed, each in 0..1")
    if task == "single" and len(set(settings.depths)) < len(settings.depths):
        raise UserError(f"ruler.depths: {list(settings.depths)} names a depth twice")
