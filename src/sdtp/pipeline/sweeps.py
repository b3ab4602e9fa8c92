"""Where and how often to prune: the cells of the paper's Fig. 4 and 5, and their tables."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation.stats import holm, paired_difference
from sdtp.pipeline.config import PruningSettings
from sdtp.pipeline.tables import quality_cells, quality_table
from sdtp.pipeline.target_settings import SweepSettings

SWEEP_COLUMNS = [
    "task", "metric", "method", "stages", "layers", "keep_ratio", "value", "low", "high", "n", "retained",
    "difference", "difference_low", "difference_high", "p_value", "p_holm", "compression", "flop_speedup",
]  # fmt: skip

# Decoder layers of the stages, and what each keeps of the tokens that reach it.
SweepCell = tuple[tuple[int, ...], float]


def position_cells(sweep: SweepSettings) -> list[SweepCell]:
    """One stage, before each of the layers in turn (paper, Fig. 4)."""
    return [((layer,), ratio) for layer, ratio in itertools.product(sorted(sweep.layers), _falling(sweep.layer_ratios))]


def count_cells(sweep: SweepSettings, pruning: PruningSettings) -> list[SweepCell]:
    """The run's first so many stages, each with the same ratio (paper, Fig. 5): more stages keep fewer tokens."""
    return [
        (_first_stages(pruning, count), ratio)
        for count, ratio in itertools.product(sorted(sweep.counts), _falling(sweep.count_ratios))
    ]


def _first_stages(pruning: PruningSettings, count: int) -> tuple[int, ...]:
    return tuple(pruning.start + pruning.step * stage for stage in range(count))


def _falling(ratios: Sequence[float]) -> list[float]:
    return sorted(ratios, reverse=True)


def swept_layers(sweep: SweepSettings, pruning: PruningSettings, num_layers: int) -> tuple[int, ...]:
    """Every layer that a stage of either sweep stands before, ascending.

    Raises:
        UserError: one that a model of `num_layers` layers does not have, or a layer 0, naming the key.
    """
    for layer in sweep.layers:
        if not 1 <= layer < num_layers:
            raise UserError(
                f"sweep.layers: {layer} is no layer to prune at; the model has {num_layers} layers, so that 1 to "
                f"{num_layers - 1} are accepted"
            )
    most = len(range(pruning.start, num_layers, pruning.step))
    for count in sweep.counts:
        if not 1 <= count <= most:
            raise UserError(
                f"sweep.counts: {count} stages at layers {pruning.start}, {pruning.start + pruning.step}, ... (see "
                f"pruning.start and pruning.step) do not fit a model of {num_layers} layers; 1 to {most} are accepted"
            )
    return tuple(sorted({*sweep.layers, *_first_stages(pruning, max(sweep.counts))}))


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
    interval, the p-value of the pair alone, and `p_holm`, adjusted for all cells of the task and metric. `compression`
    is prompt tokens by those that the last stage leaves, and `flop_speedup` the unpruned model's operations in prefill
    by the pruned one's, scoring included: both are of the task's prompts, and neither is a measured time.

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
        difference = dict.fromkeys(("difference", "difference_low", "difference_high", "p_value"), math.nan)
        if layers:
            of = values[task, metric, name, ratio]
            pair = paired_difference([of[id_] for id_ in reference], list(reference.values()))
            difference = {
                "difference": pair.mean,
                "difference_low": pair.low,
                "difference_high": pair.high,
                "p_value": pair.p_value,
            }
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
            | difference
        )
    result = pd.DataFrame(table)
    pruned = result["method"] == "sdtp"
    result["p_holm"] = math.nan
    result.loc[pruned, "p_holm"] = (
        result[pruned]
        .groupby(["task", "metric"])["p_value"]
        .transform(lambda family: pd.Series(holm(family.tolist()), family.index))
    )
    return result[SWEEP_COLUMNS]


def _name(layers: Sequence[int]) -> str:
    """What stands for stages at these layers among the methods; no method has a colon in its name."""
    return f"sdtp:{'-'.join(map(str, layers))}"


def _cell(row: Mapping[str, Any]) -> SweepCell:
    return tuple(row["layers"]), row["keep_ratio"]


def _ratio(rows: Sequence[Mapping[str, Any]], over: str, under: str) -> float:
    """A ratio of sums; 1 of the unpruned model, which has no rows of its own."""
    return math.fsum(row[over] for row in rows) / math.fsum(row[under] for row in rows) if rows else 1.0
