"""A table or figure of the paper as it is made here: its rows, what each column is, and what was not run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.pipeline.paper.published import Numbers

# The columns that every part ends with: why a row was not run, and what runs it. Empty where it was.
NOT_RUN = ("why", "command")


@dataclasses.dataclass(frozen=True)
class Value:
    """A measured column of a part.

    Attributes:
        name: of the column; `{name}_low` and `{name}_high` are its 95% interval, `{name}_paper` is the paper's number.
        title: heading on the page.
        kind: how it is written: `number`, `count` (a whole one), `signed`, `change` (a relative one, as a
            percentage), `memory` (bytes), `text`.
        interval: whether it has one.
        published: whether the paper states it, so that the paper's column stands beside it.
    """

    name: str
    title: str
    kind: str = "number"
    interval: bool = False
    published: bool = True

    @property
    def columns(self) -> list[str]:
        """Its columns in the CSV."""
        bounds = [f"{self.name}_low", f"{self.name}_high"] if self.interval else []
        return [self.name, *bounds, *([f"{self.name}_paper"] if self.published else [])]


# What a bare interval of a difference leaves the reader to work out.
JUDGED = (Value("p_holm", "p, adjusted", published=False), Value("verdict", "Verdict", "text", published=False))


@dataclasses.dataclass(frozen=True)
class Part:
    """A table or figure of the paper.

    Attributes:
        name: key of `names.PARTS`.
        about: what the paper shows there and what stands here instead, in sentences.
        keys: columns that say what a row is -> their headings.
        values: the measured columns.
        rows: one a line of the table, with the columns `columns`; `n` is the number of examples, NaN where none count.
    """

    name: str
    about: str
    keys: Mapping[str, str]
    values: Sequence[Value]
    rows: pd.DataFrame

    @property
    def measured(self) -> pd.DataFrame:
        """The rows that were run."""
        return self.rows[self.rows["why"].isna()]


def columns(keys: Mapping[str, str], values: Sequence[Value]) -> list[str]:
    """The columns of a part's CSV, in order."""
    return [*keys, *(column for value in values for column in value.columns), "n", *NOT_RUN]


def part(
    name: str,
    about: str,
    keys: Mapping[str, str],
    values: Sequence[Value],
    rows: Sequence[dict[str, Any]],
    published: Numbers,
    place: Callable[[dict[str, Any]], str],
) -> Part:
    """Puts rows together, with the paper's numbers beside them.

    Args:
        name, about, keys, values: see `Part`.
        rows: of each row any of the columns; what is missing stays empty.
        published: the paper's numbers for this part and model.
        place: of a row, the text by which the paper's numbers are found, beside method and keep ratio.
    """
    filled, empty = [], dict.fromkeys(keys, "")
    for row in rows:
        where = str(row.get("method", "")), float(row.get("keep_ratio", math.nan)), place(empty | row)
        paper = {f"{value.name}_paper": published.get((*where, value.name)) for value in values if value.published}
        filled.append({**row, **paper})
    table = pd.DataFrame(filled, columns=columns(keys, values))
    return Part(name, about, keys, values, table.astype({"why": object, "command": object}))


def not_run(why: str, command: str, **keys: Any) -> dict[str, Any]:
    """A row of what was not run."""
    return {**keys, "why": why, "command": command}
