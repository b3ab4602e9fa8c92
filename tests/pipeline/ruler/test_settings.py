"""Settings outside what is accepted are refused by name, and only by the task they belong to."""

from __future__ import annotations

from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.ruler.settings import TASKS, check
from tests.pipeline.ruler.material import settings


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("multi_key", {"keys": 1}, r"suites\.ruler\.keys: 1 is not in 2\.\.30"),
        ("multi_key", {"keys": 31}, r"suites\.ruler\.keys: 31 is not in 2\.\.30"),
        ("multi_value", {"values": 1}, r"suites\.ruler\.values: 1 is not in 2\.\.64"),
        ("multi_query", {"queries": 31}, r"suites\.ruler\.queries: 31 is not in 2\.\.30"),
        ("variables", {"chains": 0}, r"suites\.ruler\.chains: 0 is not in 1\.\.64"),
        ("variables", {"hops": 65}, r"suites\.ruler\.hops: 65 is not in 1\.\.64"),
        ("common_words", {"common_words": 0}, r"suites\.ruler\.common_words: 0 is not in 1\.\.64"),
        ("common_words", {"rare_repeats": 0}, r"suites\.ruler\.rare_repeats: 0 is not in 1\.\.64"),
        ("common_words", {"common_repeats": 2}, r"suites\.ruler\.common_repeats: 2 is not above 2"),
        ("qa", {"distractors": 0}, r"suites\.ruler\.distractors: 0 is not in 1\.\.100000"),
        ("single", {"depths": ()}, r"suites\.ruler\.depths: \[\]; at least one"),
        ("single", {"depths": (0.0, 1.1)}, r"suites\.ruler\.depths: \[0\.0, 1\.1\]; .* each in 0\.\.1"),
        ("single", {"depths": (0.5, 0.5)}, r"suites\.ruler\.depths: .* names a depth twice"),
    ],
)
def test_each_setting_is_checked_by_its_own_task(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(settings(**changes), task)
    for other in TASKS:
        if other != task:
            check(settings(**changes), other)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"suites\.ruler\.tasks: 'niah' is no task; accepted: single, multi_key"):
        check(settings(), "niah")
