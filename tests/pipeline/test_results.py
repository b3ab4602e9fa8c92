from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdtp.errors import UserError
from sdtp.pipeline import results
from tests.pipeline import synthetic_run


def write(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path, index=False)
    return path


def test_tables_come_back_as_they_were_written(tmp_path: Path) -> None:
    for table, read in (
        (synthetic_run.latency(), results.read_latency),
        (synthetic_run.quality(), results.read_quality),
        (synthetic_run.history(), results.read_history),
    ):
        pd.testing.assert_frame_equal(read(write(table, tmp_path / "table.csv")), table)
    quality = synthetic_run.quality()
    table = synthetic_run.comparisons(quality)
    pd.testing.assert_frame_equal(results.read_comparisons(write(table, tmp_path / "table.csv"), quality), table)


@pytest.mark.parametrize(
    ("method", "ratio", "length"), [("sdtp", 0.8, 1024), ("unpruned", 1.0, 512), ("sdtp", 0.7, 2048)]
)
def test_a_missing_latency_row_is_named(tmp_path: Path, method: Any, ratio: Any, length: Any) -> None:
    table = synthetic_run.latency()
    gone = (table["method"] == method) & (table["keep_ratio"] == ratio) & (table["prompt_tokens"] == length)
    named = f"latency.csv: no row for method={method}, keep_ratio={ratio}, prompt_tokens={length};"
    with pytest.raises(UserError, match=named):
        results.read_latency(write(table[~gone], tmp_path / "latency.csv"))


@pytest.mark.parametrize("method", ["unpruned", "sdtp"])
def test_a_missing_arm_is_named(tmp_path: Path, method: Any) -> None:
    table = synthetic_run.latency()
    with pytest.raises(UserError, match=f"no row of method {method};"):
        results.read_latency(write(table[table["method"] != method], tmp_path / "latency.csv"))


@pytest.mark.parametrize(
    ("task", "metric", "method", "ratio"),
    [
        ("retrieval", "accuracy", "recent", 0.8),
        ("continuation", "loss", "unpruned", 1.0),
        ("retrieval", "loss", "sdtp", 0.7),
    ],
)
def test_a_missing_quality_row_is_named(tmp_path: Path, task: Any, metric: Any, method: Any, ratio: Any) -> None:
    table = synthetic_run.quality()
    gone = (table[["task", "metric", "method", "keep_ratio"]] == [task, metric, method, ratio]).all(axis=1)
    assert gone.sum() == 1
    named = f"quality.csv: no row for task={task}, metric={metric}, method={method}, keep_ratio={ratio};"
    with pytest.raises(UserError, match=named):
        results.read_quality(write(table[~gone], tmp_path / "quality.csv"))


def test_pairs_are_each_method_with_unpruned_and_sdtp_with_each_other_method_at_its_ratio() -> None:
    cells = [("t", "loss", *arm) for arm in (("unpruned", 1.0), ("sdtp", 0.9), ("random", 0.9), ("random", 0.8))]
    assert results.pairs_of(cells) == [
        ("t", "loss", "sdtp", "unpruned", 0.9),
        ("t", "loss", "random", "unpruned", 0.9),
        ("t", "loss", "random", "unpruned", 0.8),
        ("t", "loss", "sdtp", "random", 0.9),
    ]


@pytest.mark.parametrize(("method", "other"), [("recent", "unpruned"), ("sdtp", "recent")])
def test_a_missing_comparison_is_named(tmp_path: Path, method: Any, other: Any) -> None:
    quality = synthetic_run.quality()
    table = synthetic_run.comparisons(quality)
    keys = ["task", "metric", "method", "other", "keep_ratio"]
    gone = (table[keys] == ["continuation", "loss", method, other, 0.8]).all(axis=1)
    assert gone.sum() == 1
    named = rf"no row for task=continuation, metric=loss, method={method}, other={other}, keep_ratio=0\.8;"
    with pytest.raises(UserError, match=named):
        results.read_comparisons(write(table[~gone], tmp_path / "comparisons.csv"), quality)


def test_a_row_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = synthetic_run.quality()
    with pytest.raises(
        UserError, match=r"more than one row for task=retrieval, metric=accuracy, method=sdtp, keep_ratio=0\.9"
    ):
        results.read_quality(write(pd.concat([table, table.iloc[[1]]]), tmp_path / "quality.csv"))


def test_only_unpruned_quality_is_refused(tmp_path: Path) -> None:
    table = synthetic_run.quality()
    with pytest.raises(UserError, match="only unpruned rows"):
        results.read_quality(write(table[table["method"] == "unpruned"], tmp_path / "quality.csv"))


def test_missing_columns_empty_tables_and_unknown_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quality.csv: no column ci_low, n; accepted: task, metric"):
        results.read_quality(write(synthetic_run.quality().drop(columns=["ci_low", "n"]), tmp_path / "quality.csv"))
    with pytest.raises(UserError, match=r"history.csv: no rows"):
        results.read_history(write(synthetic_run.history().iloc[:0], tmp_path / "history.csv"))
    with pytest.raises(UserError, match=r"history.csv: split is validation; accepted: train, heldout"):
        results.read_history(write(synthetic_run.history().replace("heldout", "validation"), tmp_path / "history.csv"))


@pytest.mark.parametrize(("tokens", "nearest"), [(1, 512), (767, 512), (768, 512), (769, 1024), (99999, 2048)])
def test_nearest_length_is_a_benchmarked_one_and_the_shorter_of_two(tokens: Any, nearest: Any) -> None:
    assert results.nearest_length(synthetic_run.latency(), tokens) == nearest


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("accuracy", -0.1, 0.1, "no difference shown"),
        ("accuracy", 0.0, 0.1, "no difference shown"),
        ("accuracy", -0.1, 0.0, "no difference shown"),
        ("accuracy", 0.0, 0.0, "no difference shown"),
        ("accuracy", -0.2, -0.1, "worse"),
        ("accuracy", 0.1, 0.2, "better"),
        ("loss", -0.2, -0.1, "better"),
        ("loss", 0.1, 0.2, "worse"),
        ("loss", float("nan"), float("nan"), "no difference shown"),
    ],
)
def test_verdict_is_that_of_the_paired_interval_where_the_test_agrees(
    metric: Any, low: Any, high: Any, expected: Any
) -> None:
    assert results.verdict(metric, low, high, 0.05) == expected
    assert results.verdict(metric, low, high, 0.06) == "no difference shown"
