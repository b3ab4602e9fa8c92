"""Predictions of both suites to scores: each by its own metric, with the columns that tables need."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdtp.evaluation.longbench.tasks import TASKS
from sdtp.evaluation.ruler.tasks import CATEGORIES
from sdtp.evaluation.suite_rows import category_of
from sdtp.evaluation.suites import score_rows
from sdtp.pipeline.ruler.settings import TASKS as RULER_TASKS

WHO = {"method": "sdtp", "keep_ratio": 0.8, "seed": None, "prompt_tokens": 100, "kept_tokens": 40}


def ruler_row(**columns: Any) -> dict[str, Any]:
    place = {"length": 100, "depth": None, "references": ["12", "34"], "chat": True, "hash": "h"}
    return {"suite": "ruler", "task": "multi_value", "id": "r1", "prediction": "12", **place, **WHO, **columns}


def longbench_row(**columns: Any) -> dict[str, Any]:
    held = {"answers": ["Paris", "the city of Paris"], "classes": []}
    return {"suite": "longbench", "task": "hotpotqa", "id": "l1", "prediction": "In Paris.", **held, **WHO, **columns}


def test_each_suite_is_scored_by_its_own_metric() -> None:
    rows = json.loads(json.dumps([ruler_row(), longbench_row()]))
    first, second = score_rows(rows)
    assert first == {
        "suite": "ruler",
        "task": "multi_value",
        "category": "retrieval",
        "id": "r1",
        "method": "sdtp",
        "keep_ratio": 0.8,
        "seed": None,
        "score": 50.0,
        "prompt_tokens": 100,
        "kept_tokens": 40,
        "length": 100,
        "depth": None,
    }
    # F1 of {in, paris} and {paris}: precision 1/2, recall 1.
    assert second["score"] == pytest.approx(100 * 2 / 3)
    assert second["category"] == "multi-document QA"
    assert list(second) == [name for name in first if name not in ("length", "depth")]


def test_classes_and_first_lines_count_in_longbench() -> None:
    row = longbench_row(task="trec", answers=["Date"], classes=["Date", "Other date"], prediction="\nDate\nOther date")
    assert next(score_rows([row]))["score"] == 100.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ruler_row(task="niah"), "'niah' is no task of suite 'ruler'"),
        (longbench_row(suite="infinite"), "'hotpotqa' is no task of suite 'infinite'"),
        (longbench_row(task="squad"), "'squad' is not a task of LongBench"),
        (ruler_row(prediction=None), "prediction of multi_value 'r1' is None: text is needed"),
        (
            {key: value for key, value in ruler_row().items() if key != "references"},
            "prediction 'r1' has no references",
        ),
        ({key: value for key, value in longbench_row().items() if key != "classes"}, "prediction 'l1' has no classes"),
        ({"id": "x"}, "prediction 'x' has no suite, task, method, keep_ratio, seed, prompt_tokens, kept_tokens, pred"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(score_rows([row]))


def test_every_task_has_a_category() -> None:
    assert list(CATEGORIES) == list(RULER_TASKS)
    assert {category_of("longbench", name) for name in TASKS} == {
        "single-document QA",
        "multi-document QA",
        "summarisation",
        "few-shot learning",
        "synthetic",
        "code completion",
    }
