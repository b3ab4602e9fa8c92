"""What the tasks can be made to ask, and the ranges that are accepted."""

from __future__ import annotations

from sdtp.errors import UserError
from sdtp.pipeline.facts import TEST
from sdtp.pipeline.target_settings import RulerSettings

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


def check(settings: RulerSettings, task: str) -> None:
    """Raise UserError for a task that does not exist, or a setting of its own outside the accepted range."""
    if task not in TASKS:
        raise UserError(f"suites.ruler.tasks: {task!r} is no task; accepted: {', '.join(TASKS)}")
    ranges = {
        "multi_key": {"keys": (2, len(TEST.entities))},
        "multi_value": {"values": (2, _MOST)},
        "multi_query": {"queries": (2, len(TEST.entities))},
        "variables": {"chains": (1, _MOST), "hops": (1, _MOST)},
        "common_words": {"common_words": (1, _MOST), "rare_repeats": (1, _MOST)},
        "qa": {"distractors": (1, _MOST_PASSAGES)},
    }
    for name, (low, high) in ranges.get(task, {}).items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise UserError(f"suites.ruler.{name}: {value} is not in {low}..{high}")
    if task == "common_words" and settings.common_repeats <= settings.rare_repeats:
        raise UserError(
            f"suites.ruler.common_repeats: {settings.common_repeats} is not above {settings.rare_repeats}, "
            "which is suites.ruler.rare_repeats"
        )
    if task == "single" and not (settings.depths and all(0.0 <= depth <= 1.0 for depth in settings.depths)):
        raise UserError(f"suites.ruler.depths: {list(settings.depths)}; at least one is needed, each in 0..1")
    if task == "single" and len(set(settings.depths)) < len(settings.depths):
        raise UserError(f"suites.ruler.depths: {list(settings.depths)} names a depth twice")
