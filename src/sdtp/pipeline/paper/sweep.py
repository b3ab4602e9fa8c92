"""Figures 4 and 5 of the paper: where one stage stands, and how many stages there are."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from sdtp.errors import UserError
from sdtp.pipeline.paper.part import JUDGED, Part, Value, part
from sdtp.pipeline.paper.published import Numbers
from sdtp.pipeline.results import records
from sdtp.pipeline.sweeps import SWEEP_COLUMNS

ABOUT = {
    "figure-4": (
        "The paper prunes once, before one of the layers 1 to 10, at three keep ratios, and scores tasks of Table 3. "
        "Here quality is that of the run's own test examples, and differences are paired with the unpruned model."
    ),
    "figure-5": (
        "The paper prunes at one to seven stages and scores the same tasks. Here the stages are the first ones of the "
        "run's own, so that more stages keep fewer tokens; quality is that of the run's own test examples."
    ),
}
HORIZONTAL: dict[str, Literal["layers", "stages"]] = {"figure-4": "layers", "figure-5": "stages"}
HEADINGS = {"layers": "Layer", "stages": "Stages"}
VALUES = (
    Value("value", "Mean", interval=True),
    Value("difference", "Minus unpruned, paired", "signed", interval=True, published=False),
    *JUDGED,
    Value("compression", "Compression at the last layer ×", published=False),
    Value("flop_speedup", "Prefill FLOPs, unpruned / pruned", published=False),
)


def swept(name: str, table: pd.DataFrame, published: Numbers) -> Part:
    """A row each task, metric, place and keep ratio, the unpruned model's first.

    Args:
        name: `figure-4` or `figure-5`.
        table: as `sdtp.pipeline.sweeps.sweep_table` gives it.
        published: the paper's numbers.

    Raises:
        UserError: a column is missing.
    """
    missing = [column for column in SWEEP_COLUMNS if column not in table.columns]
    if missing:
        raise UserError(f"{name}: no column {', '.join(missing)}; accepted: {', '.join(SWEEP_COLUMNS)}")
    by = HORIZONTAL[name]
    keys = {"task": "Task", "metric": "Metric", "method": "Method", by: HEADINGS[by], "keep_ratio": "Keep ratio"}
    renamed = table.rename(columns={"low": "value_low", "high": "value_high"})
    rows = [row | {by: "" if row["method"] == "unpruned" else str(row[by])} for row in records(renamed)]
    return part(name, ABOUT[name], keys, VALUES, rows, published, lambda row: str(row["task"]))
