"""Tables 4 and 5 of the paper: pruners that were trained without a loss, against the run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtp.pipeline.ablations import ablation_table
from sdtp.pipeline.paper.names import ABLATIONS
from sdtp.pipeline.paper.part import Part, Value, part
from sdtp.pipeline.paper.published import Numbers

ABOUT = {
    "table-4": "The paper's pruner, and one trained without the ranking loss.",
    "table-5": "The paper's pruner, and one trained without the ranking loss and without the value loss (MSE).",
}
MORE = (
    " Here both are measured on the run's own test examples, and the difference is paired on the same ones. Every loss "
    "but those left out keeps the weight that the run's configuration gives it."
)
VARIANTS = dict(zip(ABOUT, ABLATIONS, strict=True))
FULL = "full"
KEYS = {"task": "Task", "metric": "Metric", "variant": "Trained", "keep_ratio": "Keep ratio"}
VALUES = (
    Value("value", "Mean", interval=True),
    Value("difference", "Minus full, paired", "signed", interval=True, published=False),
)

Rows = Sequence[Mapping[str, Any]]


def ablation(name: str, unpruned: Rows, full: Rows, variant: Rows, published: Numbers) -> Part:
    """A row each task, metric, pruner and keep ratio, those of the unpruned model first.

    Args:
        name: `table-4` or `table-5`.
        unpruned, full, variant: evaluation rows of the unpruned model, of the run's pruner and of the one
            without a loss.
        published: the paper's numbers.

    Raises:
        UserError: they were evaluated on other examples.
    """
    table = ablation_table(unpruned, {FULL: full, VARIANTS[name]: variant})
    rows = [
        {
            **{key: row[key] for key in ("task", "metric", "keep_ratio", "value", "n")},
            "method": row["variant"] or row["method"],
            "variant": row["variant"] or row["method"],
            "value_low": row["ci_low"],
            "value_high": row["ci_high"],
            "difference": row["minus_first"],
            "difference_low": row["first_low"],
            "difference_high": row["first_high"],
        }
        for row in table.to_dict("records")
    ]
    return part(name, ABOUT[name] + MORE, KEYS, VALUES, rows, published, lambda row: str(row["task"]))
