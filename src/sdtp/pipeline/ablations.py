"""The table of an ablation: the pruners that variants of one configuration lead to, compared on the same examples."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.pipeline import targets
from sdtp.pipeline.formats import NOTHING, number, signed
from sdtp.pipeline.results import LOWER_IS_BETTER, smoke, verdict
from sdtp.pipeline.tables import Cells, cell_difference, quality_table

# Of a variant's training: updates on labels alone, then optimizer steps through the masked model, and the step that the
# pruner was kept from; 0 is the fit to the labels alone.
TRAINING_COLUMNS = ("label_updates", "optimizer_steps", "kept_step")
ABLATION_COLUMNS = [
    "task", "metric", "method", "variant", "keep_ratio", "value", "ci_low", "ci_high", "n", "retained",
    "minus_first", "first_low", "first_high", "first_p_value", "baseline", "minus_baseline",
    "baseline_low", "baseline_high", "baseline_p_value", "kept_share", *TRAINING_COLUMNS, "same_as",
]  # fmt: skip

# (task, method or `arm` of a variant, keep ratio)
Arm = tuple[str, str, float]


def arm(variant: str) -> str:
    """What stands for a variant's pruner among the methods; no method has a colon in its name."""
    return f"sdtp:{variant}"


def all_rows(
    references: Sequence[Mapping[str, Any]], variants: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Mapping[str, Any]]:
    """The evaluation rows of the methods and of the variants together, those of a variant under its `arm`."""
    return [*references, *({**row, "method": arm(name)} for name, rows in variants.items() for row in rows)]


def ablation_table(
    rows: Sequence[Mapping[str, Any]], cells: Cells, training: Mapping[str, Mapping[str, int]]
) -> pd.DataFrame:
    """One row per task, metric, variant and keep ratio, after those of the methods they are compared with.

    A row of a variant has method `sdtp` and the variant's name; a row of another method has an empty one. `minus_first`
    is the row's mean minus that of the first variant, `minus_baseline` minus that of `baseline`: at each keep ratio the
    best of the methods that prune without a pruner of their own and without the response. Both are means of differences
    on the same examples, with 95% intervals, of the first also with the p-value of the pair alone; a row is not
    compared with itself, nor the unpruned model with either.
    `kept_share` is the mean share of the prompt's tokens that the last stage leaves, and `same_as` the first of the
    variants before it that gave every example the same value, as the same pruner does.

    Args:
        rows: as `all_rows` gives them.
        cells: of these rows, as `quality_cells` gives them.
        training: `TRAINING_COLUMNS` of each variant, the first variant first.
    """
    kept = _kept_shares(rows)
    first = arm(next(iter(training)))
    same = _same(cells, list(training))
    table = []
    for row in quality_table(cells).to_dict("records"):
        method, ratio = row["method"], row["keep_ratio"]
        panel = row["task"], row["metric"]
        best = None if method == "unpruned" else _best_baseline(cells, *panel, ratio)
        name, _, variant = method.partition(":")
        table.append(
            row
            | {
                "method": name,
                "variant": variant,
                "baseline": best or "",
                "kept_share": kept[row["task"], method, ratio],
                "same_as": same.get(variant, ""),
            }
            | dict(training.get(variant, {}))
            | _minus(cells, panel, method, None if method == "unpruned" else first, ratio, "minus_first", "first")
            | _minus(cells, panel, method, best, ratio, "minus_baseline", "baseline")
        )
    # Whole numbers also where other rows have none.
    return pd.DataFrame(table, columns=ABLATION_COLUMNS).astype(dict.fromkeys(TRAINING_COLUMNS, "Int64"))


def _same(cells: Cells, variants: Sequence[str]) -> dict[str, str]:
    """For each variant the first before it with the same value of every example in every cell, if there is one."""
    values = {
        name: {
            (task, metric, ratio): own for (task, metric, method, ratio), own in cells.items() if method == arm(name)
        }
        for name in variants
    }
    found = {}
    for place, name in enumerate(variants):
        twin = next((other for other in variants[:place] if values[other] == values[name]), None)
        if twin is not None:
            found[name] = twin
    return found


def _kept_shares(rows: Iterable[Mapping[str, Any]]) -> dict[Arm, float]:
    shares: dict[Arm, list[float]] = {}
    for row in rows:
        shares.setdefault((row["task"], row["method"], row["keep_ratio"]), []).append(
            row["kept_tokens"] / row["prompt_tokens"]
        )
    return {cell: math.fsum(values) / len(values) for cell, values in shares.items()}


def _best_baseline(cells: Cells, task: str, metric: str, ratio: float) -> str | None:
    """The baseline with the best mean in a cell's panel at its ratio, the first of equals; None where there is none."""
    means = {
        cell[2]: math.fsum(examples.values()) / len(examples)
        for cell, examples in cells.items()
        if cell[:2] == (task, metric) and cell[3] == ratio and targets.is_baseline(cell[2])
    }
    if not means:
        return None
    choose = min if metric in LOWER_IS_BETTER else max
    return choose(means, key=lambda method: means[method])


def _minus(
    cells: Cells, panel: tuple[str, str], method: str, other: str | None, ratio: float, mean: str, bounds: str
) -> dict[str, float]:
    """The columns of one paired difference; empty where there is nothing to compare."""
    if other is None or other == method:
        return dict.fromkeys((mean, f"{bounds}_low", f"{bounds}_high", f"{bounds}_p_value"), math.nan)
    pair = cell_difference(*panel, cells[*panel, method, ratio], cells[*panel, other, ratio])
    return {mean: pair.mean, f"{bounds}_low": pair.low, f"{bounds}_high": pair.high, f"{bounds}_p_value": pair.p_value}


def markdown(table: pd.DataFrame, target_table: pd.DataFrame, run: str) -> str:
    """The tables as a page to read: how each variant was trained, what the differences show, and the targets.

    Args:
        table: as `ablation_table` gives it.
        target_table: as `targets.target_table` gives it, of the first variant.
        run: name of the run, for the title.
    """
    first = table.loc[table["variant"] != "", "variant"].iloc[0]
    lines = [
        f"# Variants of run {run}",
        "",
        "Means over the test examples, differences on the same examples, each with a 95% interval; better or worse is",
        "said where the interval of the difference leaves out 0 and its p-value is at most 0.05. `kept` is the share",
        "of the prompt that the last stage leaves. The best baseline of a section is the best by the means it shows.",
        "",
        *_training_lines(table),
    ]
    ratios = table.loc[table["method"] != "unpruned", "keep_ratio"].unique()
    for (task, metric), panel in table.groupby(["task", "metric"], sort=False):
        for ratio in ratios:
            rows = panel[(panel["method"] == "unpruned") | (panel["keep_ratio"] == ratio)].to_dict("records")
            best = next((row["baseline"] for row in rows if row["baseline"]), "")
            better = "lower" if metric in LOWER_IS_BETTER else "higher"
            lines += [
                "",
                f"## {task}: {metric} ({better} is better), keep ratio {ratio:g}, {smoke(int(panel['n'].min()))}",
                "",
                f"| | {metric} | minus {first} | minus {best or 'the best baseline'} | kept |",
                "|---|---|---|---|---|",
                *(_line(row) for row in rows),
            ]
    lines += ["", f"## Targets of {first}", "", *targets.markdown(target_table)]
    return "\n".join(lines) + "\n"


def _training_lines(table: pd.DataFrame) -> list[str]:
    """How the pruner of each variant came to be."""
    lines = [
        "## How each was trained",
        "",
        "Updates on labels alone, optimizer steps through the masked model, and the step that the pruner was kept",
        "from: that of the least held-out loss, where the configuration has patience. Kept from step 0 it is the fit",
        "to the labels alone, and no other loss had a say in it.",
        "",
        "| variant | label updates | steps | kept from step | the same values as |",
        "|---|---|---|---|---|",
    ]
    for row in table[table["variant"] != ""].drop_duplicates("variant").to_dict("records"):
        numbers = [number(int(row[column])) for column in TRAINING_COLUMNS]
        lines.append(f"| {row['variant']} | {' | '.join(numbers)} | {row['same_as'] or NOTHING} |")
    return lines


def _line(row: Mapping[str, Any]) -> str:
    name = f"**{row['variant']}**" if row["variant"] else row["method"]
    value = f"{number(row['value'])} [{number(row['ci_low'])}, {number(row['ci_high'])}]"
    fields = [name, value, _shown(row, "minus_first", "first"), _shown(row, "minus_baseline", "baseline")]
    return f"| {' | '.join(fields)} | {row['kept_share']:.0%} |"


def _shown(row: Mapping[str, Any], mean: str, bounds: str) -> str:
    """A difference with its interval, and what it shows; a dash where nothing was compared."""
    if math.isnan(row[mean]):
        return NOTHING
    low, high = row[f"{bounds}_low"], row[f"{bounds}_high"]
    shown = verdict(row["metric"], low, high, row[f"{bounds}_p_value"])
    text = f"{signed(row[mean])} [{signed(low)}, {signed(high)}]"
    return text if shown == "no difference shown" else f"{text} {shown}"
