"""Scores from predictions: rules of tasks, best over references; no model."""

from __future__ import annotations

import pytest

from sdtp.evaluation.longbench.references import Reference
from sdtp.evaluation.longbench.scoring import score
from sdtp.evaluation.longbench.tasks import TASKS

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
