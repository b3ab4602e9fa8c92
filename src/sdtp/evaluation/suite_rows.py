"""The suites of long-context tasks, and the columns of their predictions and scores, by which steps read each other.

Nothing here scores, so that a change of a metric leaves predictions as they are.
"""

from __future__ import annotations

from sdtp.evaluation.longbench.tasks import task
from sdtp.evaluation.ruler.tasks import CATEGORIES

SUITES = ("ruler", "longbench")
# Of a prediction what its score keeps, in this order; `length` and `depth` are of RULER.
KEPT = ("suite", "task", "category", "id", "method", "keep_ratio", "seed")
COUNTS = ("prompt_tokens", "kept_tokens")
PLACES = ("length", "depth")


def category_of(suite: str, name: str) -> str:
    """What a suite counts a task among.

    Raises:
        ValueError: an unknown suite or task.
    """
    if suite == "longbench":
        return task(name).category.value
    if suite != "ruler" or name not in CATEGORIES:
        raise ValueError(f"{name!r} is no task of suite {suite!r}: of ruler {', '.join(CATEGORIES)} are accepted")
    return CATEGORIES[name]
