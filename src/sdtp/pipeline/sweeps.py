"""Where and how often to prune: which examples that is measured on, and the tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.pipeline.results import difference_columns, with_verdicts
from sdtp.pipeline.sweep_cells import SweepCell
from sdtp.pipeline.tables import cell_difference, quality_cells, quality_table

SWEEP_COLUMNS = [
    "task", "metric", "method", "stages", "layers", "keep_ratio", "value", "low", "high", "n", "retained",
    "difference", "difference_low", "difference_high", "p_value", "p_holm", "verdict", "compression", "flop_speedup",
]  # fmt: skip


def first_of_each_task(examples: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` examples of each task, or as many as there are, in their order."""
    seen: Counter[str] = Counter()
    chosen = []
    for example in examples:
        seen[example["task"]] += 1
        if seen[example["task"]] <= count:
            chosen.append(dict(example))
    return chosen


def check_complete(rows: Iterable[Mapping[str, Any]], cells: Iterable[SweepCell], ids: Sequence[str]) -> None:
    """Raise UserError unless `rows` are one for each cell and example that was due, and no other."""
    due = Counter((*cell, id_) for cell in cells for id_ in ids)
    found = Counter((tuple(row["layers"]), row["keep_ratio"], row["id"]) for row in rows)
    for problem, wrong in (("no row", due - found), ("a row too many", found - due)):
        if wrong:
            layers, ratio, id_ = next(iter(wrong))
            raise UserError(
                f"--evaluations have {problem} for {wrong.total()} of {due.total()} evaluations, stages at layers "
                f"{list(layers)} with keep ratio {ratio} on example {id_!r} for one: one row each is needed"
            )


def sweep_table(
    unpruned: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], cells: Sequence[SweepCell]
) -> pd.DataFrame:
    """One row per task, metric and cell, after that of the unpruned model.

    `value` is a mean with its 95% interval; `difference` the mean of cell minus unpruned over the same examples, its
    interval, the p-value of the pair alone, `p_holm`, adjusted for all cells of the task and metric, and the `verdict`
    that the interval gives. `compression` is prompt tokens by those that the last stage leaves, and `flop_speedup` the
    unpruned model's operations in prefill by the pruned one's, scoring included: both are of the task's prompts, and
    neither is a measured time.

    Args:
        unpruned: evaluation rows of the unpruned model.
        rows: evaluation rows of the cells; those of other cells are left out.
        cells: in the order of the table.

    Raises:
        UserError: a cell was evaluated on other examples than the unpruned model.
    """
    named = {_name(layers): layers for layers, _ in cells}
    own = [{**row, "method": _name(row["layers"])} for cell in cells for row in rows if _cell(row) == cell]
    values = quality_cells([*unpruned, *own])
    table = []
    for row in quality_table(values).to_dict("records"):
        task, metric, name, ratio = (row[key] for key in ("task", "metric", "method", "keep_ratio"))
        layers = named.get(name, ())
        examples = [one for one in own if (one["task"], one["method"], one["keep_ratio"]) == (task, name, ratio)]
        reference = values[task, metric, "unpruned", 1.0]
        of = values[task, metric, name, ratio]
        pair = cell_difference(task, metric, of, reference) if layers else None
        table.append(
            row
            | {
                "method": "sdtp" if layers else "unpruned",
                "stages": len(layers),
                "layers": " ".join(map(str, layers)),
                "low": row["ci_low"],
                "high": row["ci_high"],
                "compression": _ratio(examples, "prompt_tokens", "kept_tokens"),
                "flop_speedup": _ratio(examples, "unpruned_flop", "flop"),
            }
            | difference_columns(pair)
        )
    return with_verdicts(pd.DataFrame(table), ["task", "metric"])[SWEEP_COLUMNS]


def _name(layers: Sequence[int]) -> str:
    """What stands for stages at these layers among the methods; no method has a colon in its name."""
    return f"sdtp:{'-'.join(map(str, layers))}"


def _cell(row: Mapping[str, Any]) -> SweepCell:
    return tuple(row["layers"]), row["keep_ratio"]


def _ratio(rows: Sequence[Mapping[str, Any]], over: str, under: str) -> float:
    """A ratio of sums; 1 of the unpruned model, which has no rows of its own."""
    return math.fsum(row[over] for row in rows) / math.fsum(row[under] for row in rows) if rows else 1.0
