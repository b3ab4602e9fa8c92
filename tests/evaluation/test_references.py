"""A reference stands in a prediction, never the other way round."""

from __future__ import annotations

import pytest

from sdtp.evaluation.references import found


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("12", ["12", "34"], [True, False]),
        ("", ["12", "34"], [False, False]),
        ("1", ["12"], [False]),  # the prediction in the reference is no hit
        ("The answer is \n PARIS .", [" Paris "], [True]),
    ],
)
def test_references_found(prediction: str, references: list[str], expected: list[bool]) -> None:
    assert found(prediction, references) == expected


def test_blank_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="a blank one is in every text"):
        found("anything", ["12", " "])
