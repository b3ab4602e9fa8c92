"""What an example's predictions are held against, as its data have it."""

from __future__ import annotations

import dataclasses
import re

from sdtp.evaluation.longbench.tasks import Metric

_PARAGRAPH = {Metric.RETRIEVAL: "Paragraph ", Metric.RETRIEVAL_ZH: "段落"}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an example's prediction is held against.

    Attributes:
        answers: the right ones, at least one.
        classes: all there are, for tasks that classify; none for others.
    """

    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


def paragraph_number(reference: str, metric: Metric) -> str:
    """The digits after the word for a paragraph in a reference of `RETRIEVAL` or `RETRIEVAL_ZH`.

    Raises:
        ValueError: the reference has no such word with a number.
    """
    found = re.search(_PARAGRAPH[metric] + r"(\d+)", reference)
    if found is None:
        raise ValueError(f'{reference!r} names no paragraph; "{_PARAGRAPH[metric]}" and a number are needed')
    return found.group(1)
