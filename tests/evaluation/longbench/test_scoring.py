"""Scores from predictions: rules of tasks, best over references, means; no model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdtp.evaluation.longbench.scoring import Reference, score, score_rows, summarise
from sdtp.evaluation.longbench.tasks import TASKS, Category, Language, of_language
from sdtp.evaluation.stats import mean_interval

DATE = Reference(("Date",), ("City", "Date"))


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("hotpotqa", " Paris ", Reference(("London", "Paris")), 100.0),
        ("hotpotqa", "12", Reference(("12", "34")), 100.0),  # the best, not the mean
        ("hotpotqa", "Paris\nLondon", Reference(("Paris",)), 100 * 2 / 3),  # all lines: 2/(2+1)
        ("triviaqa", "Paris\nLondon", Reference(("Paris",)), 100.0),  # the first
        ("trec", "\n\nDate\nQuestion: which? Type: City", DATE, 100.0),
        ("trec", "City\nDate", DATE, 0.0),
        ("lsht", "体育\n军事", Reference(("体育",), ("体育", "军事")), 100.0),
        ("samsum", "They met\nDialogue", Reference(("They met",)), 100.0),
        ("trec", " \nDate", DATE, 0.0),  # only newlines are passed over
    ],
)
def test_rules_of_tasks(name: str, prediction: str, reference: Reference, expected: float) -> None:
    assert score(TASKS[name], prediction, reference) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("prediction", ["", "  ", "\n", "\n \n"])
def test_a_blank_prediction_scores_0(name: str, prediction: str) -> None:
    # References that end in what a blank prediction has too.
    assert score(TASKS[name], prediction, Reference(("Paragraph 1 段落1. ", "    1"), ("1", " "))) == 0.0


def row(task: str, identifier: str, prediction: Any) -> dict[str, Any]:
    return {"task": task, "id": identifier, "prediction": prediction}


REFERENCES = {
    ("narrativeqa", "a"): Reference(("yes",)),
    ("narrativeqa", "b"): Reference(("no",)),
    ("narrativeqa", "c"): Reference(("not predicted",)),
    ("qasper", "a"): Reference(("no",)),
    ("trec", "a"): DATE,
}
ROWS = [
    row("trec", "a", "Date"),
    row("narrativeqa", "a", "yes"),
    row("narrativeqa", "b", "?"),
    row("qasper", "a", "no"),
]


def test_rows_and_references_give_scores_of_tasks_categories_and_all() -> None:
    scores = score_rows(ROWS, REFERENCES)
    assert scores == {"narrativeqa": {"a": 100.0, "b": 0.0}, "qasper": {"a": 100.0}, "trec": {"a": 100.0}}
    assert list(scores) == ["narrativeqa", "qasper", "trec"]  # the benchmark's order, not the rows'
    summary = summarise(scores, REFERENCES)
    assert {name: cell.mean for name, cell in summary.tasks.items()} == {"narrativeqa": 50, "qasper": 100, "trec": 100}
    assert summary.categories == {Category.SINGLE_DOCUMENT: 75.0, Category.FEW_SHOT: 100.0}  # tasks weigh the same
    assert summary.task_mean == pytest.approx(250 / 3)
    assert summary.category_mean == 87.5
    assert (summary.tasks["narrativeqa"].n, summary.tasks["narrativeqa"].n_total) == (2, 3)
    assert (summary.tasks["narrativeqa"].low, summary.tasks["narrativeqa"].high) == mean_interval([100.0, 0.0])
    assert math.isnan(summary.tasks["trec"].low)


def test_means_are_those_of_the_published_leaderboard() -> None:
    """GPT-3.5-Turbo-16k, from the benchmark's own tables, which round to one digit."""
    values = (
        *(23.6, 43.3, 52.3, 61.2),
        *(51.6, 37.7, 26.9, 28.7),
        *(29.5, 23.4, 26.7, 16.0),
        *(68.0, 91.4, 41.7, 29.2),
        *(4.5, 71.0, 77.5),
        *(54.7, 53.6),
    )
    published = dict(zip(TASKS, values, strict=True))
    for language, categories, average in (
        (Language.ENGLISH, [39.8, 38.7, 26.5, 67.1, 37.8, 54.1], 44.0),
        (Language.CHINESE, [61.2, 28.7, 16.0, 29.2, 77.5, 54.1], 44.5),
    ):
        scores = {name: {"x": published[name]} for name in of_language(language)}
        summary = summarise(scores, [(name, "x") for name in scores])
        assert list(summary.categories) == list(Category)
        assert list(summary.categories.values()) == pytest.approx(categories, abs=0.11)
        assert summary.category_mean == pytest.approx(average, abs=0.06)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([row("nq", "a", "yes")], "'nq' is not a task of LongBench"),
        ([row("qasper", "b", "yes")], "prediction of qasper 'b': there is no such example among the references"),
        ([ROWS[1], ROWS[1]], "prediction of narrativeqa 'a': there are two"),
        ([row("qasper", "a", None)], "prediction of qasper 'a' is None: text is needed"),
    ],
)
def test_unusable_rows_are_refused(rows: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        score_rows(rows, REFERENCES)


def test_no_score_is_no_mean() -> None:
    with pytest.raises(ValueError, match="0 scores of 0 tasks"):
        summarise({}, [])
    with pytest.raises(ValueError, match="0 scores of 1 tasks"):
        summarise({"qasper": {}}, [])
