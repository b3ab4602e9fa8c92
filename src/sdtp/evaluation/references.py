"""Which of the right answers stand in a predicted text."""

from __future__ import annotations

from collections.abc import Sequence


def found(prediction: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference occurs in the predicted text, letter case and surrounding blanks aside.

    All of it true is the strict score, the mean the partial one. A reference has to be in the prediction, never the
    other way round: an empty prediction finds nothing.

    Raises:
        ValueError: a blank reference, which every text contains.
    """
    if any(not reference.strip() for reference in references):
        raise ValueError(f"references are {list(references)}: a blank one is in every text")
    text = prediction.casefold()
    return [reference.strip().casefold() in text for reference in references]
