"""What the pruner is held to, as paired comparisons that each say whether they are met.

A target names cells: methods, tasks and keep ratios, which need not be the same on both sides. Each of its comparisons
is of the same examples, and is judged by the 95% interval of their mean difference against the margin: met where the
interval lies beyond it, not met where it lies short of it, not decided where it holds it or examples are too few.

The best baseline is not chosen: by the means of the same examples that would often be the luckiest, and an interval
that takes no account of the choice would be wrong. A target against it is a comparison with each baseline, and is met
where all are. That needs no correction for their number (an intersection-union test, Berger 1982): whichever is best in
truth, the target is met by mistake no more often than the comparison with that one is. Only whether a target asks for
anything, by how far the best baseline is below the unpruned model, is read off the means.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sdtp.evaluation.names import LEARNED, parts
from sdtp.evaluation.stats import difference_interval
from sdtp.pipeline.formats import NOTHING, number, signed
from sdtp.pipeline.results import LOWER_IS_BETTER
from sdtp.pipeline.tables import Cells, right_answer

TARGET_COLUMNS = [
    "target", "task", "metric", "first", "second", "n", "difference", "ci_low", "ci_high", "margin", "outcome", "why",
]  # fmt: skip
# Fewer decide nothing here.
LEAST_EXAMPLES = 400
# How much worse still counts as no worse: 2 points of accuracy, 0.01 nats of loss.
MARGINS = {"accuracy": 0.02, "loss": 0.01}
NO_MARGINS = dict.fromkeys(MARGINS, 0.0)
# How far below the unpruned model the best baseline must be for the pruner to have to be better.
GAPS = {"accuracy": 0.05, "loss": 0.03}
# A gap that is met exactly is not missed by rounding.
ROUNDING = 1e-9

MET, NOT_MET, NOT_DECIDED = "met", "not met", "not decided"
NOT_ASKED, NOT_MEASURED = "not asked for", "not measured"
OUTCOMES = (MET, NOT_MET, NOT_DECIDED, NOT_ASKED, NOT_MEASURED)

# The paper's scorer, where an ablation has a variant of this name.
PAPER = "sdtp:paper"
# Where the oracle is the measure; and the ratio whose FLOPs are spent against the paper's scorer at the former.
HIGH, LOW = 0.9, 0.8


@dataclass(frozen=True)
class Target:
    """How a target judges the difference of two means.

    Attributes:
        words: what it asks of the pruner.
        margins: by metric, how much worse the first may be, >= 0.
        strict: whether the interval must lie beyond the margin, or may touch it.
    """

    words: str
    margins: Mapping[str, float]
    strict: bool = True


TARGETS = {
    "no-worse": Target("no worse than any baseline: at most 2 points or 0.01 nats", MARGINS),
    "better": Target(
        "better than every baseline wherever the best of them is 5 points or 0.03 nats below unpruned", NO_MARGINS
    ),
    "oracle": Target(f"continuation at {HIGH}: at least as good as the oracle saliency", NO_MARGINS, strict=False),
    "paper": Target(f"at {LOW} no worse than the paper's scorer at {HIGH}: at most 2 points or 0.01 nats", MARGINS),
}


def is_baseline(method: str) -> bool:
    """Whether a method prunes without a pruner of its own and without the response, which the oracle reads."""
    return ":" not in method and parts(method)[0] not in (*LEARNED, "unpruned", "oracle")


def target_table(cells: Cells, subject: str) -> pd.DataFrame:
    """One row per comparison of every target, in the targets' order; a target whose cells are not there says so.

    `difference` is the mean over `n` examples of `first` minus `second`, in the metric's own unit, `margin` what it is
    judged against: where lower is better the first may be so much higher, else so much lower.

    Args:
        cells: as `quality_cells` gives them.
        subject: the method among them that is held to the targets.
    """
    ratios = sorted({ratio for _, _, method, ratio in cells if method == subject}, reverse=True)
    baselines = list(dict.fromkeys(method for _, _, method, _ in cells if is_baseline(method)))
    panels = list(dict.fromkeys(cell[:2] for cell in cells if cell[1] in MARGINS))
    rows = []
    for target in ("no-worse", "better"):
        for (task, metric), ratio in ((panel, ratio) for panel in panels for ratio in ratios):
            gap, of = _smallest_gap(cells, (task, metric), ratio, baselines)
            for baseline in baselines or ["baseline"]:
                row = _compared(cells, target, (task, metric), (subject, ratio), (baseline, ratio))
                if target == "better" and gap < GAPS[metric] - ROUNDING and row["outcome"] != NOT_MEASURED:
                    why = f"{of}, the best by its mean, loses {number(gap)} to unpruned, less than {GAPS[metric]}"
                    row |= {"outcome": NOT_ASKED, "why": why}
                rows.append(row)
    rows.append(_compared(cells, "oracle", ("continuation", "loss"), (subject, HIGH), ("oracle", HIGH)))
    rows += [_compared(cells, "paper", panel, (subject, LOW), (PAPER, HIGH)) for panel in panels]
    return pd.DataFrame(rows, columns=TARGET_COLUMNS)


def _smallest_gap(cells: Cells, panel: tuple[str, str], ratio: float, baselines: Sequence[str]) -> tuple[float, str]:
    """How much worse than unpruned the best baseline is by its mean, and its name; infinity where there is none."""
    task, metric = panel
    unpruned = cells[task, metric, "unpruned", 1.0]
    gaps = [
        (-_gain(metric, _mean_difference(cells[task, metric, method, ratio], unpruned)), method)
        for method in baselines
        if (task, metric, method, ratio) in cells
    ]
    return min(gaps, default=(math.inf, ""))


def _compared(
    cells: Cells, target: str, panel: tuple[str, str], first: tuple[str, float], second: tuple[str, float]
) -> dict[str, Any]:
    """The row of one comparison of (method, keep ratio) with another."""
    task, metric = panel
    margin = TARGETS[target].margins[metric]
    row = {
        "target": target,
        "task": task,
        "metric": metric,
        "first": _shown_arm(*first),
        "second": _shown_arm(*second),
        "n": 0,
        **dict.fromkeys(("difference", "ci_low", "ci_high"), math.nan),
        "margin": margin,
    }
    missing = [_shown_arm(*arm) for arm in (first, second) if (task, metric, *arm) not in cells]
    if missing:
        return row | {"outcome": NOT_MEASURED, "why": f"no {' and no '.join(missing)} in this configuration"}
    ones, others = cells[task, metric, *first], cells[task, metric, *second]
    pair = [ones[id_] for id_ in others], list(others.values())
    low, high = difference_interval(*pair, right_answer(task, metric))
    outcome, why = judged(metric, low, high, margin, len(others), strict=TARGETS[target].strict)
    return row | {
        "n": len(others), "difference": _mean_difference(ones, others), "ci_low": low, "ci_high": high,
        "outcome": outcome, "why": why,
    }  # fmt: skip


def judged(metric: str, low: float, high: float, margin: float, n: int, *, strict: bool) -> tuple[str, str]:
    """Whether a difference with a 95% interval meets its target, and why, in words.

    Args:
        metric: says which way is better.
        low, high: of the difference, in the metric's unit.
        margin: how much worse is allowed, >= 0.
        n: examples.
        strict: whether the interval must lie beyond the margin, or may touch it.
    """
    if n < LEAST_EXAMPLES:
        return NOT_DECIDED, f"{n} examples, and {LEAST_EXAMPLES} are needed"
    worst, best = sorted((_gain(metric, low), _gain(metric, high)))
    limit = signed(-_gain(metric, margin))
    if worst > -margin or (not strict and worst == -margin):
        return MET, f"the interval lies on the better side of {limit}"
    if best < -margin or (strict and best == -margin):
        return NOT_MET, f"the interval lies on the worse side of {limit}"
    return NOT_DECIDED, f"the interval holds {limit}"


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    """The outcome of each target: met where all that it asks for is, not met where anything is not.

    Args:
        table: as `target_table` gives it.
    """
    found = {}
    for target in TARGETS:
        outcomes = set(table.loc[table["target"] == target, "outcome"])
        asked = outcomes - {NOT_ASKED}
        if NOT_MET in asked:
            found[target] = NOT_MET
        elif not asked:
            found[target] = NOT_ASKED
        elif len(asked) == 1:
            (found[target],) = asked
        else:
            found[target] = NOT_DECIDED
    return found


def counts(table: pd.DataFrame) -> Iterator[tuple[str, int]]:
    """How many comparisons of each target had each outcome, as names of metrics: (`no-worse/met`, 3), ..."""
    for target in TARGETS:
        outcomes = table.loc[table["target"] == target, "outcome"]
        for outcome in OUTCOMES:
            yield f"{target}/{outcome.replace(' ', '-')}", int((outcomes == outcome).sum())


def markdown(table: pd.DataFrame) -> list[str]:
    """The lines of a section: each target's outcome, then the comparisons it is made of.

    Args:
        table: as `target_table` gives it.
    """
    lines = [
        f"Each judged by the 95% interval of a difference on the same examples, of which {LEAST_EXAMPLES} are needed;",
        "accuracy in shares (0.02 is 2 points), losses in nats. Not decided: the interval holds the margin, so that",
        "these examples do not tell. Every baseline is compared and all must hold: the best by these very means would",
        "often be the luckiest.",
        "",
        "| target | outcome | of its comparisons |",
        "|---|---|---|",
    ]
    for target, outcome in verdicts(table).items():
        own = table.loc[table["target"] == target, "outcome"]
        tally = [f"{int((own == one).sum())} {one}" for one in OUTCOMES if (own == one).any()]
        lines.append(f"| {TARGETS[target].words} | **{outcome}** | {', '.join(tally) or NOTHING} |")
    for target, words in TARGETS.items():
        rows = table[table["target"] == target].to_dict("records")
        if not rows:
            continue
        lines += [
            "",
            f"### {words.words[0].upper()}{words.words[1:]}",
            "",
            "| task | metric | compared | n | difference | margin | outcome |",
            "|---|---|---|---|---|---|---|",
            *(_line(row) for row in rows),
        ]
    return lines


def _line(row: Mapping[Hashable, Any]) -> str:
    difference = NOTHING
    if not math.isnan(row["difference"]):
        difference = f"{signed(row['difference'])} [{signed(row['ci_low'])}, {signed(row['ci_high'])}]"
    margin = signed(-_gain(row["metric"], row["margin"]))
    compared = f"{row['first']} − {row['second']}"
    fields = [row["task"], row["metric"], compared, number(row["n"]) if row["n"] else NOTHING, difference, margin]
    return f"| {' | '.join(fields)} | {row['outcome']}: {row['why']} |"


def _shown_arm(method: str, ratio: float) -> str:
    """`sdtp/default@0.8`: a method, with its variant where it has one, at a keep ratio."""
    return f"{method.replace(':', '/')}@{ratio:g}"


def _mean_difference(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    return math.fsum(first[id_] - value for id_, value in second.items()) / len(second)


def _gain(metric: str, difference: float) -> float:
    """A difference as what is gained: above 0 the first is better."""
    return -difference if metric in LOWER_IS_BETTER else difference
