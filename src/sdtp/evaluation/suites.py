"""The suites of long-context tasks as one: their predictions to scores, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sdtp.evaluation.longbench import scoring as longbench
from sdtp.evaluation.longbench.references import Reference
from sdtp.evaluation.longbench.tasks import task
from sdtp.evaluation.ruler import scoring as ruler
from sdtp.evaluation.suite_rows import COUNTS, KEPT, PLACES, category_of


def score_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each prediction's score by its suite's metric.

    Args:
        rows: with the columns of `KEPT` (but `category`) and `COUNTS`, `prediction`, and what it is held against:
            `references` of RULER, `answers` and `classes` of LongBench.

    Yields:
        The columns of `KEPT`, `score` from 0 to 100, those of `COUNTS`, and of `PLACES` those that the row has.

    Raises:
        ValueError: an unknown suite or task; a column that is missing; a prediction that is not text.
    """
    for row in rows:
        _check(row)
        suite, name, prediction = row["suite"], row["task"], row["prediction"]
        if suite == "ruler":
            score = ruler.score(name, prediction, row["references"])
        else:
            reference = Reference(tuple(row["answers"]), tuple(row["classes"]))
            score = longbench.score(task(name), prediction, reference)
        identified = {**row, "category": category_of(suite, name)}
        yield {
            **{column: identified[column] for column in KEPT},
            "score": score,
            **{column: row[column] for column in COUNTS},
            **{column: row[column] for column in PLACES if column in row},
        }


def _check(row: Mapping[str, Any]) -> None:
    references = ("references",) if row.get("suite") == "ruler" else ("answers", "classes")
    missing = [name for name in (*KEPT, *COUNTS, "prediction", *references) if name not in row and name != "category"]
    if missing:
        raise ValueError(f"prediction {row.get('id')!r} has no {', '.join(missing)}: a row of `sdtp predict` is needed")
    if not isinstance(row["prediction"], str):
        raise ValueError(f"prediction of {row['task']} {row['id']!r} is {row['prediction']!r}: text is needed")
