"""From predictions to scores of examples, groups of them and a heat map, without a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdtp.evaluation.references import found
from sdtp.evaluation.ruler.tasks import PART_MATCH
from sdtp.evaluation.stats import wilson_interval


def score(task: str, prediction: str, references: Sequence[str]) -> float:
    """Percent of the references that stand in the prediction; for a task of `PART_MATCH` 100 where one does.

    Raises:
        ValueError: no references, or a blank one.
    """
    if not references:
        raise ValueError(f"task {task}: no references; at least one is needed")
    hits = found(prediction, references)
    return 100.0 * (any(hits) if task in PART_MATCH else sum(hits) / len(hits))


def scored(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Predictions with their `score`, in percent.

    Args:
        rows: as `predict` gives them, or as read back from JSON lines; other columns, a method's name say, stay.

    Raises:
        ValueError: as `score`.
    """
    for row in rows:
        yield {**row, "score": score(row["task"], row["prediction"], row["references"])}


@dataclasses.dataclass(frozen=True)
class Score:
    """The mean score of a group of predictions.

    Attributes:
        group: values of the columns that the predictions were grouped by.
        value: mean score in percent.
        ci_low, ci_high: its 95% Wilson interval in percent, a little too wide where an example has several references.
        n: predictions.
        prompt_tokens, kept_tokens: means.
    """

    group: dict[str, Any]
    value: float
    ci_low: float
    ci_high: float
    n: int
    prompt_tokens: float
    kept_tokens: float


def scores(rows: Iterable[Mapping[str, Any]], by: Sequence[str] = ("task", "length")) -> list[Score]:
    """Scores of groups of predictions, groups in the order in which they come up.

    Args:
        rows: as `scored` gives them; of their columns `id`, `score`, those of `by` and the counts of tokens are used.
        by: columns that tell groups apart.

    Raises:
        ValueError: a row without one of the columns, or an example twice in one group.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        missing = [name for name in by if name not in row]
        if missing:
            raise ValueError(f"prediction {row['id']} has no {missing[0]!r}, which scores are to be grouped by")
        key = tuple(row[name] for name in by)
        if row["id"] in groups.setdefault(key, {}):
            raise ValueError(f"example {row['id']} stands twice in the group {dict(zip(by, key, strict=True))}")
        groups[key][row["id"]] = row
    return [_mean(dict(zip(by, key, strict=True)), list(group.values())) for key, group in groups.items()]


def _mean(group: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> Score:
    shares = [row["score"] / 100 for row in rows]
    low, high = wilson_interval(shares)
    return Score(
        group=group,
        value=100 * math.fsum(shares) / len(shares),
        ci_low=100 * low,
        ci_high=100 * high,
        n=len(rows),
        prompt_tokens=math.fsum(row["prompt_tokens"] for row in rows) / len(rows),
        kept_tokens=math.fsum(row["kept_tokens"] for row in rows) / len(rows),
    )


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Scores of a single fact by where it stands and how long the prompt is.

    Attributes:
        depths, lengths: ascending.
        values: [depths, lengths], mean score in percent.
        n: fewest predictions of a cell.
    """

    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    values: np.ndarray
    n: int


def heat_map(rows: Iterable[Mapping[str, Any]]) -> HeatMap:
    """The heat map of one method's scored predictions; those of tasks that draw their depths are left out.

    Raises:
        ValueError: no prediction has a depth, or a depth was not asked at every length.
    """
    cells = {
        (cell.group["depth"], cell.group["length"]): cell
        for cell in scores((row for row in rows if row["depth"] is not None), ("depth", "length"))
    }
    if not cells:
        raise ValueError("no prediction has a depth: a heat map needs those of the task 'single'")
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    missing = [(depth, length) for depth in depths for length in lengths if (depth, length) not in cells]
    if missing:
        depth, length = missing[0]
        raise ValueError(f"no prediction at depth {depth} and length {length}: each depth is needed at each length")
    values = np.array([[cells[depth, length].value for length in lengths] for depth in depths])
    return HeatMap(tuple(depths), tuple(lengths), values, min(cell.n for cell in cells.values()))
