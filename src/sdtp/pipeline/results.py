"""The tables of a run, read and checked: what each CSV holds, and how a row of one finds that of another.

Speed belongs to a keep ratio: every method that keeps as many tokens leaves the model the same work. Quality belongs
to a method and a ratio. Figures and report join the two here, so that both say the same. Methods are compared on the
same examples only: by the intervals of paired differences, never by whether two rows' own intervals overlap.
"""

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation import names
from sdtp.evaluation.stats import PairedDifference, holm, shown
from sdtp.pipeline.reading import reading

# fmt: off
LATENCY_COLUMNS = [
    "method", "keep_ratio", "prompt_tokens", "new_tokens", "prefill_s", "prefill_q25", "prefill_q75", "decode_s",
    "end_to_end_s", "repeats", "prefill_tflop", "flop_bound", "length_bound", "prefill_speedup", "speedup_q25",
    "efficiency", "flop_efficiency", "peak_memory_bytes", "kv_cache_bytes", "decode_speedup", "end_to_end_speedup",
    "kept_tokens", "cold_prefill_s", "scoring_tflop", "overhead_s", "scoring_s", "peak_memory_ratio",
]
QUALITY_COLUMNS = ["task", "metric", "method", "keep_ratio", "value", "ci_low", "ci_high", "n", "retained"]
COMPARISON_COLUMNS = [
    "task", "metric", "method", "other", "keep_ratio", "mean", "ci_low", "ci_high", "p_value", "n", "p_holm",
]
# fmt: on
HISTORY_COLUMNS = ["step", "split", "metric", "value"]

# With fewer examples the interval of a share of right answers reaches ten points and more to either side.
SMOKE_BELOW = 100
LOWER_IS_BETTER = frozenset({"loss", "kl"})
# How closely a method predicts what the unpruned model does, right or wrong: no quality of its own.
AGREEMENT = frozenset({"kl", "top1"})

# A cell of quality.csv: task, metric, method, keep ratio.
Cell = tuple[str, str, str, float]
# What a row of comparisons.csv compares: task, metric, method, other method, keep ratio.
Pair = tuple[str, str, str, str, float]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, each by the names of its columns."""
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


def difference_columns(pair: PairedDifference | None) -> dict[str, float]:
    """A paired comparison as columns of a table, all missing where there is none, as of what is compared with."""
    if pair is None:
        return dict.fromkeys(("difference", "difference_low", "difference_high", "p_value"), math.nan)
    return {
        "difference": pair.mean,
        "difference_low": pair.low,
        "difference_high": pair.high,
        "p_value": pair.p_value,
    }


def with_verdicts(table: pd.DataFrame, family: list[str]) -> pd.DataFrame:
    """A table whose rows have `difference_columns`, with what they show of themselves and among others.

    Args:
        table: the difference may be of a `metric`; where there is no such column, more is better.
        family: columns; rows that are equal in them are looked at together.

    Returns:
        The table with `p_holm`, the p-value adjusted for all comparisons of the row's family, and `verdict` as that
        function words it; both are missing in a row that is compared with nothing.
    """
    compared = table["p_value"].notna()
    adjusted: dict[Any, float] = {}
    for _, own in table[compared].groupby(family, dropna=False):
        adjusted |= zip(own.index, holm(own["p_value"].tolist()), strict=True)
    judged = [
        verdict(row.get("metric"), row["difference_low"], row["difference_high"], row["p_value"])
        if pd.notna(row["p_value"])
        else None
        for row in table.to_dict("records")
    ]
    holms = [adjusted.get(index, math.nan) for index in table.index]
    return table.assign(p_holm=holms, verdict=pd.Series(judged, table.index, dtype=object))


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """Reads a CSV that must have every one of `columns` and at least one row; other columns are left out."""
    with reading(path, "a table as the step tables or train writes it is needed"):
        table = pd.read_csv(path)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; accepted: {', '.join(columns)}")
    if table.empty:
        raise UserError(f"{path}: no rows; accepted: at least one")
    return table[columns]


def read_latency(path: Path) -> pd.DataFrame:
    """latency.csv, one row a (method, keep_ratio, prompt_tokens); raises UserError naming the rows that are missing."""
    table = read_table(path, LATENCY_COLUMNS)
    arms = list(table[["method", "keep_ratio"]].drop_duplicates().itertuples(index=False, name=None))
    for name in ("unpruned", "sdtp"):
        if name not in table["method"].values:
            raise UserError(f"{path}: no row of method {name}; accepted: rows of unpruned and of sdtp")
    wanted = [(*arm, length) for arm, length in product(arms, sorted(table["prompt_tokens"].unique()))]
    _require(path, table, ["method", "keep_ratio", "prompt_tokens"], wanted)
    return table


def read_quality(path: Path) -> pd.DataFrame:
    """quality.csv, one row a (task, metric, method, keep_ratio); raises UserError naming the rows that are missing."""
    table = read_table(path, QUALITY_COLUMNS)
    pruned = table[table["method"] != "unpruned"]
    if pruned.empty:
        raise UserError(f"{path}: only unpruned rows; accepted: rows of at least one pruning method")
    cells = [("unpruned", 1.0), *product(pruned["method"].unique(), sorted(pruned["keep_ratio"].unique()))]
    panels = table[["task", "metric"]].drop_duplicates().itertuples(index=False, name=None)
    _require(path, table, ["task", "metric", "method", "keep_ratio"], [(*p, *c) for p, c in product(panels, cells)])
    return table


def read_comparisons(path: Path, quality: pd.DataFrame) -> pd.DataFrame:
    """comparisons.csv, one row a pair of `pairs_of` the rows of `quality`; raises UserError naming those missing."""
    table = read_table(path, COMPARISON_COLUMNS)
    cells = quality[["task", "metric", "method", "keep_ratio"]].itertuples(index=False, name=None)
    _require(path, table, ["task", "metric", "method", "other", "keep_ratio"], pairs_of(cells))
    return table


def read_history(path: Path) -> pd.DataFrame:
    """history.csv: step, split (train or heldout), metric, value; raises UserError for any other split."""
    table = read_table(path, HISTORY_COLUMNS)
    unknown = sorted(set(table["split"]) - {"train", "heldout"})
    if unknown:
        raise UserError(f"{path}: split is {', '.join(map(str, unknown))}; accepted: train, heldout")
    return table


def _require(path: Path, table: pd.DataFrame, keys: list[str], wanted: list[tuple]) -> None:
    """Raises UserError unless `table` holds each wanted combination of `keys` exactly once."""
    counts = table.value_counts(keys).to_dict()
    for problem, rows in (
        ("no row", [row for row in wanted if row not in counts]),
        ("more than one row", [row for row in wanted if counts.get(row, 0) > 1]),
    ):
        if rows:
            named = "; ".join(", ".join(f"{key}={value}" for key, value in zip(keys, row, strict=True)) for row in rows)
            raise UserError(f"{path}: {problem} for {named}; accepted: one row each")


def pairs_of(cells: Iterable[Cell]) -> list[Pair]:
    """Which cells are compared: each method with unpruned, and SDTP with each other method at the same keep ratio."""
    pruned = [cell for cell in cells if cell[2] != "unpruned"]
    learned = {(task, metric, ratio) for task, metric, method, ratio in pruned if method == "sdtp"}
    return [(task, metric, method, "unpruned", ratio) for task, metric, method, ratio in pruned] + [
        (task, metric, "sdtp", method, ratio)
        for task, metric, method, ratio in pruned
        if method != "sdtp" and (task, metric, ratio) in learned
    ]


def nearest_length(latency: pd.DataFrame, prompt_tokens: float) -> int:
    """The benchmarked prompt length nearest to `prompt_tokens` tokens; of two as near, the shorter."""
    lengths = sorted(latency["prompt_tokens"].unique())
    return int(min(lengths, key=lambda length: abs(length - prompt_tokens)))


def speed_at(latency: pd.DataFrame, prompt_tokens: int) -> pd.DataFrame:
    """The pruned rows of one benchmarked length, indexed by keep_ratio, largest ratio first."""
    rows = latency[(latency["method"] == "sdtp") & (latency["prompt_tokens"] == prompt_tokens)]
    return rows.set_index("keep_ratio").sort_index(ascending=False)


def with_speedup(quality: pd.DataFrame, latency: pd.DataFrame, prompt_tokens: float) -> pd.DataFrame:
    """Pruned quality rows with `prefill_speedup` of their ratio at the benchmarked length nearest to `prompt_tokens`.

    Those of `sdtp-tuned` are left out: its stages keep other numbers of tokens, and so it has a speed of its own, which
    the trade-off measures.

    Args:
        quality: as `read_quality` gives it.
        latency: as `read_latency` gives it.
        prompt_tokens: typical prompt length of the quality rows, in tokens.

    Raises:
        UserError: a keep ratio of `quality` was not benchmarked.
    """
    pruned = quality[~quality["method"].isin(["unpruned", names.TUNED])]
    speed = speed_at(latency, nearest_length(latency, prompt_tokens))["prefill_speedup"]
    missing = sorted(set(pruned["keep_ratio"]) - set(speed.index))
    if missing:
        named = ", ".join(f"keep_ratio={ratio}" for ratio in missing)
        raise UserError(f"latency.csv: no sdtp row for {named}, which quality.csv has; accepted: every ratio in both")
    return pruned.assign(prefill_speedup=pruned["keep_ratio"].map(speed))


def quality_panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The tasks and metrics of a table that figures have a panel of, in its order; agreement is in tables alone."""
    own = table.loc[~table["metric"].isin(AGREEMENT), ["task", "metric"]]
    return list(own.drop_duplicates().itertuples(index=False, name=None))


def few(n: int) -> bool:
    """Whether `n` examples are too few to compare methods by."""
    return n < SMOKE_BELOW


def smoke(n: int) -> str:
    """What to write beside a quality number of `n` examples: a warning where they are few, the count otherwise."""
    return f"smoke: n = {n}" if few(n) else f"n = {n}"


def verdict(metric: str | None, low: float, high: float, p_value: float) -> str:
    """What a paired difference shows: better, worse, or no difference shown.

    Args:
        metric: says which way is better; None for one of which more is.
        low, high, p_value: of the difference, see `stats.shown`.
    """
    if shown(low, high, p_value):
        return "better" if (high < 0) == (metric in LOWER_IS_BETTER) else "worse"
    return "no difference shown"
