"""Tables 4 and 5 of the paper: pruners that were trained without a loss, against the run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.pipeline.ablations import ablation_table, all_rows
from sdtp.pipeline.paper.names import ABLATIONS
from sdtp.pipeline.paper.part import JUDGED, Part, Value, part
from sdtp.pipeline.paper.published import Numbers
from sdtp.pipeline.results import records, with_verdicts
from sdtp.pipeline.tables import quality_cells

ABOUT = {
    "table-4": "The paper's pruner, and one trained without the ranking loss.",
    "table-5": "The paper's pruner, and one trained without the ranking loss and without the value loss (MSE). These "
    "are all that the labels are fitted by, so that the fit falls away with them: that pruner has its optimizer steps "
    "alone, and the difference is that of fewer updates too.",
}
MORE = (
    " Here both are measured on the run's own test examples, and the difference is paired on the same ones. Every loss "
    "but those left out keeps the weight that the run's configuration gives it. Beside each pruner stand its updates: "
    "those of the fit to the labels, then the steps of the optimizer through the pruned model."
)
VARIANTS = dict(zip(ABOUT, ABLATIONS, strict=True))
FULL = "full"
KEYS = {"task": "Task", "metric": "Metric", "variant": "Trained", "keep_ratio": "Keep ratio"}
VALUES = (
    Value("value", "Mean", interval=True),
    Value("difference", "Minus full, paired", "signed", interval=True, published=False),
    *JUDGED,
    Value("label_updates", "Label updates", "count", published=False),
    Value("optimizer_steps", "Optimizer steps", "count", published=False),
)

UPDATES = ("label_updates", "optimizer_steps")

Rows = Sequence[Mapping[str, Any]]


def ablation(
    name: str, unpruned: Rows, full: Rows, variant: Rows, training: Sequence[Mapping[str, int]], published: Numbers
) -> Part:
    """A row each task, metric, pruner and keep ratio, those of the unpruned model first.

    Args:
        name: `table-4` or `table-5`.
        unpruned, full, variant: evaluation rows of the unpruned model, of the run's pruner and of the one
            without a loss.
        training: `sdtp.pipeline.ablations.TRAINING_COLUMNS` of these two pruners.
        published: the paper's numbers.

    Raises:
        UserError: they were evaluated on other examples.
    """
    pruners = (FULL, VARIANTS[name])
    evaluated = all_rows(unpruned, dict(zip(pruners, (full, variant), strict=True)))
    table = ablation_table(evaluated, quality_cells(evaluated), dict(zip(pruners, training, strict=True)))
    rows = [
        {
            **{key: row[key] for key in ("task", "metric", "keep_ratio", "value", "n", *UPDATES)},
            "method": row["variant"] or row["method"],
            "variant": row["variant"] or row["method"],
            "value_low": row["ci_low"],
            "value_high": row["ci_high"],
            "difference": row["minus_first"],
            "difference_low": row["first_low"],
            "difference_high": row["first_high"],
            "p_value": row["first_p_value"],
        }
        for row in table.to_dict("records")
    ]
    judged = with_verdicts(pd.DataFrame(rows), ["task", "metric"])
    return part(name, ABOUT[name] + MORE, KEYS, VALUES, records(judged), published, lambda row: str(row["task"]))
