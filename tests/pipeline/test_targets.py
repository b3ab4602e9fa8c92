"""The targets on made-up cells: what is compared with what, when each is met, and what is not there to compare."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from sdtp.evaluation.stats import difference_interval
from sdtp.pipeline import targets
from sdtp.pipeline.tables import Cells
from sdtp.pipeline.targets import TARGET_COLUMNS, TARGETS, counts, is_baseline, judged, target_table, verdicts
from tests.pipeline.rows import only

N = targets.LEAST_EXAMPLES
SUBJECT = "sdtp:ours"


def values(*pattern: float) -> dict[str, float]:
    """N examples that repeat a pattern."""
    return {f"x{index}": pattern[index % len(pattern)] for index in range(N)}


# Differences that are the same for every example have an interval of no width: the outcomes below are sharp.
CELLS: Cells = {
    ("retrieval", "accuracy", "unpruned", 1.0): values(1, 1, 1, 0),
    ("retrieval", "accuracy", "recent", 0.9): values(1, 1, 0, 0),
    ("retrieval", "accuracy", "lastquery", 0.9): values(1, 0, 1, 1),  # as good as unpruned
    ("retrieval", "accuracy", SUBJECT, 0.9): values(1, 1, 0, 0),
    ("retrieval", "accuracy", "sdtp:paper", 0.9): values(0, 0, 1, 1),
    ("retrieval", "accuracy", "recent", 0.8): values(0, 0, 0, 0),
    ("retrieval", "accuracy", "lastquery", 0.8): values(0, 0, 0, 0),
    ("retrieval", "accuracy", SUBJECT, 0.8): values(1, 1, 1, 1),
    ("continuation", "loss", "unpruned", 1.0): values(3.0),
    ("continuation", "kl", "unpruned", 1.0): values(0.0),  # of which nothing is asked
    ("continuation", "kl", SUBJECT, 0.9): values(0.1),
    ("continuation", "loss", "recent", 0.9): values(3.04),
    ("continuation", "loss", "lastquery", 0.9): values(3.08),
    ("continuation", "loss", "oracle", 0.9): values(3.045),
    ("continuation", "loss", SUBJECT, 0.9): values(3.045),
    ("continuation", "loss", "sdtp:paper", 0.9): values(3.05, 3.07),
    ("continuation", "loss", "recent", 0.8): values(3.08),
    ("continuation", "loss", "lastquery", 0.8): values(3.0, 3.2),
    ("continuation", "loss", SUBJECT, 0.8): values(3.06),
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return target_table(CELLS, SUBJECT)


def of(table: pd.DataFrame, target: str, task: str, second: str) -> pd.Series:
    return only(table, target=target, task=task, second=second)


def test_every_baseline_is_compared_at_every_ratio_and_two_targets_across_them(table: pd.DataFrame) -> None:
    assert list(table.columns) == TARGET_COLUMNS
    assert list(dict.fromkeys(table["target"])) == list(TARGETS)
    pairs = table.groupby("target", sort=False)[["task", "first", "second"]].apply(lambda rows: rows.values.tolist())
    against_baselines = [
        [task, f"sdtp/ours@{ratio}", f"{method}@{ratio}"]
        for task in ("retrieval", "continuation")
        for ratio in (0.9, 0.8)
        for method in ("recent", "lastquery")
    ]
    assert pairs["no-worse"] == pairs["better"] == against_baselines
    assert pairs["oracle"] == [["continuation", "sdtp/ours@0.9", "oracle@0.9"]]
    assert pairs["paper"] == [[task, "sdtp/ours@0.8", "sdtp/paper@0.9"] for task in ("retrieval", "continuation")]
    assert set(table["n"]) == {N}


def test_no_worse_is_judged_by_the_margin_of_the_metric(table: pd.DataFrame) -> None:
    margins = table[table["target"] == "no-worse"].groupby("metric")["margin"].unique()
    assert (list(margins["accuracy"]), list(margins["loss"])) == ([0.02], [0.01])
    close = of(table, "no-worse", "continuation", "recent@0.9")  # 0.005 nats worse
    assert (close["difference"], close["ci_low"], close["ci_high"]) == pytest.approx((0.005, 0.005, 0.005))
    assert (close["outcome"], close["why"]) == ("met", "the interval lies on the better side of +0.0100")
    worse = of(table, "no-worse", "retrieval", "lastquery@0.9")  # a quarter of the examples worse
    assert worse["difference"] == -0.25
    ones, others = (CELLS["retrieval", "accuracy", method, 0.9] for method in (SUBJECT, "lastquery"))
    expected = difference_interval([ones[id_] for id_ in others], list(others.values()), 1.0)
    assert (worse["ci_low"], worse["ci_high"]) == expected
    assert (worse["outcome"], worse["why"]) == ("not met", "the interval lies on the worse side of −0.0200")
    assert of(table, "no-worse", "continuation", "lastquery@0.8")["outcome"] == "met"


def test_better_is_asked_where_every_baseline_is_far_below_unpruned(table: pd.DataFrame) -> None:
    # At 0.9 lastquery is as good as unpruned: of recent, 25 points below it, nothing is asked either.
    for second in ("recent@0.9", "lastquery@0.9"):
        row = of(table, "better", "retrieval", second)
        assert row["outcome"] == "not asked for"
        assert row["why"] == "lastquery, the best by its mean, loses 0 to unpruned, less than 0.05"
        assert not math.isnan(row["difference"])
    # recent loses 0.04 nats, and is 0.005 better; lastquery loses 0.08.
    assert of(table, "better", "continuation", "recent@0.9")["outcome"] == "not met"
    assert of(table, "better", "continuation", "lastquery@0.9")["outcome"] == "met"
    assert of(table, "better", "retrieval", "recent@0.8")["outcome"] == "met"
    assert set(table.loc[table["target"] == "better", "margin"]) == {0}


def test_a_gap_of_exactly_what_asks_is_not_lost_to_rounding() -> None:
    cells: Cells = {
        ("continuation", "loss", "unpruned", 1.0): values(3.0),
        ("continuation", "loss", "recent", 0.9): values(3.03),  # in floating point a little less than 0.03 above it
        ("continuation", "loss", SUBJECT, 0.9): values(3.0),
    }
    assert of(target_table(cells, SUBJECT), "better", "continuation", "recent@0.9")["outcome"] == "met"


def test_as_good_as_the_oracle_is_met_by_the_same_and_needs_no_margin(table: pd.DataFrame) -> None:
    row = of(table, "oracle", "continuation", "oracle@0.9")
    assert (row["difference"], row["margin"], row["outcome"]) == (0, 0, "met")


def test_the_papers_scorer_is_compared_across_ratios(table: pd.DataFrame) -> None:
    row = of(table, "paper", "continuation", "sdtp/paper@0.9")
    assert row["difference"] == pytest.approx(3.06 - 3.06)  # means of 0.8 and of 0.9
    assert row["outcome"] == "met"
    row = of(table, "paper", "retrieval", "sdtp/paper@0.9")
    assert (row["difference"], row["outcome"]) == (0.5, "met")


def test_a_target_is_met_where_all_its_comparisons_are(table: pd.DataFrame) -> None:
    assert verdicts(table) == {"no-worse": "not met", "better": "not met", "oracle": "met", "paper": "met"}
    rest = table[(table["second"] != "lastquery@0.9") & (table["second"] != "recent@0.9")]
    assert verdicts(rest) == dict.fromkeys(TARGETS, "met")
    found = dict(counts(table))
    assert found["no-worse/met"] == 7
    assert found["no-worse/not-met"] == 1
    assert found["better/not-asked-for"] == 2
    assert sum(found.values()) == len(table)


def test_not_measured_says_what_is_not_there() -> None:
    cells = {("continuation", "loss", "unpruned", 1.0): values(3.0), ("continuation", "loss", "sdtp", 0.7): values(3.1)}
    table = target_table(cells, "sdtp")
    assert list(table["outcome"]) == ["not measured"] * 4
    assert list(table["why"]) == [
        "no baseline@0.7 in this configuration",
        "no baseline@0.7 in this configuration",
        "no sdtp@0.9 and no oracle@0.9 in this configuration",
        "no sdtp@0.8 and no sdtp/paper@0.9 in this configuration",
    ]
    assert verdicts(table) == dict.fromkeys(TARGETS, "not measured")
    assert "| continuation | loss | sdtp@0.9 − oracle@0.9 | – | – | 0 | not measured: no sdtp@0.9 and" in "\n".join(
        targets.markdown(table)
    )


@pytest.mark.parametrize(
    ("metric", "low", "high", "margin", "strict", "outcome"),
    [
        ("accuracy", -0.019, 0.01, 0.02, True, "met"),
        ("accuracy", -0.021, 0.01, 0.02, True, "not decided"),
        ("accuracy", -0.02, 0.01, 0.02, True, "not decided"),  # the bound must be above it
        ("accuracy", -0.05, -0.021, 0.02, True, "not met"),
        ("loss", -0.05, 0.009, 0.01, True, "met"),
        ("loss", -0.05, 0.011, 0.01, True, "not decided"),
        ("loss", 0.011, 0.05, 0.01, True, "not met"),
        ("loss", -0.05, 0.0, 0.0, True, "not decided"),
        ("loss", -0.05, 0.0, 0.0, False, "met"),
        ("loss", 0.0, 0.05, 0.0, True, "not met"),
        ("loss", 0.0, 0.05, 0.0, False, "not decided"),
    ],
)
def test_an_interval_is_judged_by_the_side_of_the_margin_it_lies_on(
    metric: str, low: float, high: float, margin: float, strict: bool, outcome: str
) -> None:
    assert judged(metric, low, high, margin, N, strict=strict)[0] == outcome
    assert judged(metric, low, high, margin, N - 1, strict=strict) == (
        "not decided",
        f"{N - 1} examples, and {N} are needed",
    )


def test_baselines_are_what_prunes_without_a_pruner_and_without_the_response() -> None:
    methods = ["unpruned", "sdtp", "sdtp-half", "sdtp+h2o", "sdtp:mine", "oracle", "recent", "fastkv", "kvpress-SnapKV"]
    assert [method for method in methods if is_baseline(method)] == ["recent", "fastkv", "kvpress-SnapKV"]


def test_page_shows_each_targets_outcome_and_its_comparisons(table: pd.DataFrame) -> None:
    lines = targets.markdown(table)
    assert f"| {TARGETS['no-worse'].words} | **not met** | 7 met, 1 not met |" in lines
    assert "### No worse than any baseline: at most 2 points or 0.01 nats" in lines
    row = next(line for line in lines if "sdtp/ours@0.9 − recent@0.9 " in line and "continuation" in line)
    assert row == (
        "| continuation | loss | sdtp/ours@0.9 − recent@0.9 | 400 | +0.00500 [+0.00500, +0.00500] | +0.0100 | "
        "met: the interval lies on the better side of +0.0100 |"
    )
