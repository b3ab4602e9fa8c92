"""From a prediction to its score, and from scores to a heat map, without a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sdtp.evaluation.references import found
from sdtp.evaluation.ruler.tasks import PART_MATCH


def score(task: str, prediction: str, references: Sequence[str]) -> float:
    """Percent of the references that stand in the prediction; for a task of `PART_MATCH` 100 where one does.

    Raises:
        ValueError: no references, or a blank one.
    """
    if not references:
        raise ValueError(f"task {task}: no references; at least one is needed")
    hits = found(prediction, references)
    return 100.0 * (any(hits) if task in PART_MATCH else sum(hits) / len(hits))


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
    """The heat map of one method's scores; those of tasks that draw their depths are left out.

    Args:
        rows: one an example, with `task`, `id`, `length`, `depth` and `score`.

    Raises:
        ValueError: no row has a depth, a depth was not asked at every length, or an example stands there twice.
    """
    cells: dict[tuple[float, int], dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["depth"] is None:
            continue
        cell, example = cells.setdefault((row["depth"], row["length"]), {}), (row["task"], row["id"])
        if example in cell:
            raise ValueError(f"{example[0]} {example[1]!r} stands twice at depth {row['depth']}")
        cell[example] = row["score"]
    if not cells:
        raise ValueError("no prediction has a depth: a heat map needs those of the task 'single'")
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    missing = [(depth, length) for depth in depths for length in lengths if (depth, length) not in cells]
    if missing:
        depth, length = missing[0]
        raise ValueError(f"no prediction at depth {depth} and length {length}: each depth is needed at each length")
    means = {place: math.fsum(cell.values()) / len(cell) for place, cell in cells.items()}
    values = np.array([[means[depth, length] for length in lengths] for depth in depths])
    return HeatMap(tuple(depths), tuple(lengths), values, min(map(len, cells.values())))
