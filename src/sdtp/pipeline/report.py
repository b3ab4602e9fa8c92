"""The report of a run: one HTML page that holds everything it shows and loads nothing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from sdtp.errors import UserError
from sdtp.pipeline import html_page
from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.formats import flatten
from sdtp.pipeline.plotstyle import saliency_name
from sdtp.pipeline.results import (
    AGREEMENT,
    LOWER_IS_BETTER,
    Pair,
    nearest_length,
    records,
    speed_at,
    verdict,
    with_speedup,
)
from sdtp.pipeline.targets import is_baseline
from sdtp.pipeline.token_view import removal_stages


@dataclass(frozen=True)
class Run:
    """What one report is made of.

    Attributes:
        settings: the settings the report was given, shown as they are.
        model, data: the manifests of the model and data folders.
        layers: decoder layer of each pruning stage.
        tests: of each task of the test split, the prompt lengths in tokens.
        latency, quality, comparisons, history: as `sdtp.pipeline.results` reads them.
        generations: rows of every generations file, each with id, task, keep_ratio, prompt_tokens, kept (positions left
            after each stage), scores (of the tokens that entered each stage, in their order; none for a stage that
            asked for none), pruned_text, unpruned_text, reference.
        shown: id of the generation whose prompt is shown token by token.
        tokens: the texts of that prompt's tokens.
        figures: SVG bytes by the names of `FIGURES`.
        timed_on: the device, dtype and libraries of the timings, as one line.
        warmup: rounds of all arms before the timed ones.
        reduction: that of the saliency, a key of `plotstyle.REDUCTIONS`.
        versions: name -> version of the software, and the machine, that made the report.
    """

    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    layers: Sequence[int]
    tests: Mapping[str, Sequence[int]]
    latency: pd.DataFrame
    quality: pd.DataFrame
    comparisons: pd.DataFrame
    history: pd.DataFrame
    generations: Sequence[Mapping[str, Any]]
    shown: str
    tokens: Sequence[str]
    figures: Mapping[str, bytes]
    timed_on: str
    warmup: int
    reduction: str
    versions: Mapping[str, str]

    @property
    def prompt_tokens(self) -> float:
        """Median prompt length of the examples that quality was measured on."""
        return float(pd.Series([length for lengths in self.tests.values() for length in lengths]).median())


def render(run: Run) -> str:
    """The page as HTML; equal runs give equal text.

    Raises:
        UserError: a figure, a row or a generation is missing or contradicts another, or the page is 10 MB or more.
    """
    with_speedup(run.quality, run.latency, run.prompt_tokens)  # raises where a ratio was not benchmarked
    return html_page.render(
        "report.html.j2",
        "report",
        scripts=("page.js", "tokens.js"),
        remedy=" (lower generation.examples or generation.max_new_tokens)",
        run=run,
        cards=cards(run),
        quality_length=nearest_length(run.latency, run.prompt_tokens),
        fewest=int(run.quality["n"].min()),
        latency=run.latency.to_dict("records"),
        repeats=sorted(run.latency.loc[run.latency["method"] == "sdtp", "repeats"].unique()),
        quality=quality_tables(run.quality, run.comparisons),
        figures=html_page.embedded(run.figures, FIGURES),
        titles=FIGURES,
        saliency=saliency_name(run.reduction),
        views=token_views(run),
        examples=examples(run.generations),
        curves=curve_ends(run.history),
        model=flatten(run.model),
        data=flatten(run.data),
        config=yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True),
    )


def cards(run: Run) -> list[dict[str, Any]]:
    """What each keep ratio gained and cost, largest ratio first; speeds at the quality's length and at the longest."""
    result = []
    near, longest = nearest_length(run.latency, run.prompt_tokens), int(run.latency["prompt_tokens"].max())
    for ratio in speed_at(run.latency, longest).index:
        gains = [_gain(run.latency, ratio, length) for length in sorted({near, longest})]
        result.append({"ratio": ratio, "gains": gains, "costs": _costs(run, ratio)})
    return result


def _gain(latency: pd.DataFrame, ratio: float, length: int) -> dict[str, Any]:
    pruned: Any = speed_at(latency, length).loc[ratio]
    full = latency[(latency["method"] == "unpruned") & (latency["prompt_tokens"] == length)].iloc[0]
    return {
        "prompt_tokens": length,
        "new_tokens": int(pruned["new_tokens"]),
        "speedup": pruned["prefill_speedup"],
        "lower_quartile": pruned["speedup_q25"],
        "efficiency": pruned["efficiency"],
        "end_to_end": pruned["end_to_end_speedup"],
        "cache_change": pruned["kv_cache_bytes"] / full["kv_cache_bytes"] - 1,
        "memory_change": pruned["peak_memory_ratio"] - 1,
    }


def _costs(run: Run, ratio: float) -> list[dict[str, Any]]:
    """SDTP's quality rows at one ratio, each compared with unpruned and with the baselines of the same ratio.

    `best_other` is the baseline with the best mean, with SDTP's verdict against it; `beaten_by` are all baselines,
    best first, that SDTP is shown to be worse than.
    """
    judged = _judged(run.comparisons)
    costs: list[dict[str, Any]] = []
    own = run.quality[(run.quality["method"] == "sdtp") & (run.quality["keep_ratio"] == ratio)]
    for row in records(own[~own["metric"].isin(AGREEMENT)]):  # from unpruned it can but fall short
        task, metric = row["task"], row["metric"]
        cell = run.quality[(run.quality["task"] == task) & (run.quality["metric"] == metric)]
        rivals = cell[(cell["keep_ratio"] == ratio) & cell["method"].map(is_baseline)]
        rivals = rivals.sort_values("value", ascending=metric in LOWER_IS_BETTER, kind="stable")
        others = [
            {**other, "verdict": judged[task, metric, "sdtp", other["method"], ratio]["verdict"]}
            for other in records(rivals)
        ]
        costs.append(
            {
                **row,
                "unpruned": cell.loc[cell["method"] == "unpruned", "value"].item(),
                "difference": judged[task, metric, "sdtp", "unpruned", ratio],
                "best_other": others[0] if others else None,
                "beaten_by": [other for other in others if other["verdict"] == "worse"],
            }
        )
    return costs


def quality_tables(quality: pd.DataFrame, comparisons: pd.DataFrame) -> list[dict[str, Any]]:
    """For each task and metric its rows, each compared with unpruned (None for itself), and SDTP with its rivals."""
    judged = _judged(comparisons)
    tables = []
    for panel, cell in quality.groupby(["task", "metric"], sort=False):
        task, metric = map(str, panel)
        rows = [
            {**row, "difference": judged.get((task, metric, row["method"], "unpruned", row["keep_ratio"]))}
            for row in records(cell)
        ]
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        rivals = [pair for key, pair in judged.items() if key[:2] == (task, metric) and pair["other"] != "unpruned"]
        tables.append({"task": task, "metric": metric, "better": better, "rows": rows, "rivals": rivals})
    return tables


def _judged(comparisons: pd.DataFrame) -> dict[Pair, dict[str, Any]]:
    """The rows of comparisons.csv by what they compare, each with its verdict."""
    return {
        (row["task"], row["metric"], row["method"], row["other"], row["keep_ratio"]): {
            **row,
            "verdict": verdict(row["metric"], row["ci_low"], row["ci_high"], row["p_value"]),
        }
        for row in records(comparisons)
    }


def token_views(run: Run) -> list[dict[str, Any]]:
    """For each ratio the shown prompt's tokens with the stage that removed each, how many each removed, and scores."""
    views = []
    for row in _by_ratio(row for row in run.generations if row["id"] == run.shown):
        if len(run.tokens) != row["prompt_tokens"] or len(row["kept"]) != len(run.layers):
            raise UserError(
                f"generation {row['id']}, keep_ratio {row['keep_ratio']}: {row['prompt_tokens']} tokens and "
                f"{len(row['kept'])} stages; accepted: the data's {len(run.tokens)} and the pruner's {len(run.layers)}"
            )
        stages = removal_stages(row["kept"], row["prompt_tokens"])
        counts = [stages.count(stage) for stage in range(len(run.layers) + 1)]
        tokens = list(zip(run.tokens, stages, strict=True))
        scores = json.dumps(_scores(row), separators=(",", ":"))
        views.append({"ratio": row["keep_ratio"], "tokens": tokens, "counts": counts, "scores": scores})
    if not views:
        raise UserError(f"generations: no row for id {run.shown}; accepted: an id of the generations files")
    return views


def _scores(row: Mapping[str, Any]) -> Any:
    """The scores of one generation, which has one for each token that entered a stage, or none for the stage."""
    entered = [row["prompt_tokens"], *map(len, row["kept"][:-1])]
    if [len(scores) or count for scores, count in zip(row["scores"], entered, strict=False)] != entered:
        raise UserError(
            f"generation {row['id']}, keep_ratio {row['keep_ratio']}: {', '.join(map(str, map(len, row['scores'])))} "
            f"scores; accepted: {', '.join(map(str, entered))}, one of each token that entered a stage, or 0"
        )
    return row["scores"]


def examples(generations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Generations by example, in the order of their first row: what the unpruned model wrote, and each ratio's text."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in generations:
        grouped.setdefault(row["id"], []).append(row)
    return [{**rows[0], "rows": _by_ratio(rows)} for rows in grouped.values()]


def _by_ratio(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: -row["keep_ratio"])


def curve_ends(history: pd.DataFrame) -> list[dict[str, Any]]:
    """First and last value of each metric and split."""
    ends = []
    for (metric, split), curve in history.sort_values("step").groupby(["metric", "split"], sort=False):
        first, last = curve.iloc[0], curve.iloc[-1]
        ends.append({"metric": metric, "split": split, "first": first, "last": last})
    return ends
