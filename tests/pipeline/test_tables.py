"""The tables of made-up measurements, against numbers worked out by hand."""

import math
from typing import Any

import pandas as pd
import pytest

from sdtp.errors import UserError
from sdtp.evaluation.stats import wilson_interval
from sdtp.pipeline.results import LATENCY_COLUMNS, QUALITY_COLUMNS, read_latency, read_quality
from sdtp.pipeline.steps.tables import check_complete, write_csv
from sdtp.pipeline.tables import against_baselines, efficiency, latency_table, quality_cells, quality_table


def only(table: pd.DataFrame, **values: Any) -> pd.Series:
    """The one row that holds `values`."""
    for column, value in values.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def arm(method: str, prefill: list[float], flop: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "prompt_tokens": 512,
        "new_tokens": 16,
        "prefill_s": prefill,
        "decode_s": [0.5] * len(prefill),
        "end_to_end_s": [seconds + 0.5 for seconds in prefill],
        "peak_memory_bytes": 900,
        "kv_cache_bytes": 100,
        "prefill_flop": flop,
        "cold_s": 99.0,
        **more,
    }


def job(ratio: float, unpruned: list[float], pruned: list[float], ideal: list[float]) -> dict[str, Any]:
    rows = [arm("unpruned", unpruned, 8e12), arm("sdtp", pruned, 4e12, ideal_s=ideal, kv_cache_bytes=60)]
    return {"keep_ratio": ratio, "rows": rows}


# The machine was half as fast during the second job: a speedup across jobs would be nonsense.
FAST = job(0.9, [2.0, 2.2, 1.8, 2.0, 2.0], [1.0, 1.0, 1.0, 1.25, 1.6], [0.8, 0.9, 0.95, 1.0, 1.6])
SLOW = job(0.8, [4.0, 4.0, 4.0, 4.4, 4.0], [1.6, 2.0, 1.6, 2.0, 1.0], [1.6, 1.6, 1.6, 1.6, 1.0])


class TestLatency:
    @pytest.fixture
    def table(self) -> pd.DataFrame:
        return latency_table([FAST, SLOW])

    def test_columns_are_the_contracts(self) -> None:
        assert list(latency_table([FAST]).columns) == LATENCY_COLUMNS

    def test_one_unpruned_row_pools_the_repeats_of_all_jobs(self, table: pd.DataFrame) -> None:
        assert len(table) == 3
        row = only(table, method="unpruned")
        assert row["repeats"] == 10
        assert row["prefill_s"] == pytest.approx(3.1)  # between 2.2 and 4.0
        assert row["prefill_q25"] == pytest.approx(2.0)
        assert row["prefill_q75"] == pytest.approx(4.0)
        ones = ["flop_bound", "length_bound", "prefill_speedup", "speedup_q25", "efficiency", "flop_efficiency"]
        assert row[ones].tolist() == [1.0] * 6

    def test_ratios_are_paired_within_the_job(self, table: pd.DataFrame) -> None:
        row = only(table, method="sdtp", keep_ratio=0.9)
        # Paired: 2.0, 2.2, 1.8, 1.6, 1.25; against the pooled median they would be 3.1, 3.1, 3.1, 2.48, 1.94.
        assert row["prefill_speedup"] == pytest.approx(1.8)
        assert row["speedup_q25"] == pytest.approx(1.6)
        # Paired bounds: 2.5, 2.444, 1.895, 2.0, 1.25.
        assert row["length_bound"] == pytest.approx(2.0)
        # Paired efficiencies: 0.8, 0.9, 0.95, 0.8, 1.0; the ratio of medians 1.8 / 2.0 is another number only by luck.
        assert row["efficiency"] == pytest.approx(0.9)
        assert only(table, method="sdtp", keep_ratio=0.8)["efficiency"] == pytest.approx(1.0)  # 1.0, 0.8, 1.0, 0.8, 1.0

    def test_efficiency_has_quartiles(self) -> None:
        assert efficiency(FAST["rows"][1]) == pytest.approx((0.8, 0.9, 0.95))

    def test_flop_bound_and_other_columns(self, table: pd.DataFrame) -> None:
        row = only(table, method="sdtp", keep_ratio=0.9)
        assert row["flop_bound"] == 2.0
        assert row["flop_efficiency"] == pytest.approx(0.9)
        assert row["prefill_tflop"] == 4.0
        assert row["kv_cache_bytes"] == 60
        assert row["peak_memory_bytes"] == 900
        assert row["end_to_end_s"] == pytest.approx(1.5)
        assert row["decode_s"] == 0.5
        assert row["repeats"] == 5

    def test_cold_time_is_in_no_column(self, table: pd.DataFrame) -> None:
        assert table.select_dtypes("number").drop(columns=["peak_memory_bytes", "kv_cache_bytes"]).max().max() <= 512

    def test_what_was_not_measured_stays_empty(self) -> None:
        rows = [
            arm("unpruned", [2.0], 8e12, decode_s=[None], peak_memory_bytes=None, new_tokens=1),
            arm("sdtp", [1.0], 4e12, decode_s=[None], peak_memory_bytes=None, new_tokens=1, ideal_s=[1.0]),
        ]
        table = latency_table([{"keep_ratio": 0.9, "rows": rows}])
        assert table["decode_s"].isna().all()
        assert table["peak_memory_bytes"].isna().all()

    def test_refuses_jobs_of_different_lengths(self) -> None:
        other = {"keep_ratio": 0.8, "rows": [{**row, "prompt_tokens": 1024} for row in SLOW["rows"]]}
        with pytest.raises(UserError, match=r"keep ratio 0.9.*\[512, 1024\]"):
            latency_table([FAST, other])

    def test_refuses_lists_that_are_not_paired(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            latency_table([job(0.9, [2.0, 2.0], [1.0], [1.0])])


def evaluated(
    method: str, ratio: float, correct: list[bool], losses: list[float], seed: int | None = None
) -> list[dict[str, Any]]:
    """Rows of retrieval examples r0, r1, ... and of continuation examples c0, c1, ... with the same losses."""
    identity = {"method": method, "keep_ratio": ratio, "seed": seed}
    rows = []
    for index, (right, loss) in enumerate(zip(correct, losses, strict=True)):
        rows.append({"id": f"r{index}", "task": "retrieval", "correct": right, "loss": loss, **identity})
        rows.append({"id": f"c{index}", "task": "continuation", "correct": None, "loss": loss, **identity})
    return rows


UNPRUNED = evaluated("unpruned", 1.0, [True, True, True, False], [1.0, 2.0, 3.0, 4.0])
SDTP = evaluated("sdtp", 0.9, [True, True, False, False], [1.1, 2.1, 3.1, 4.1])
IDS = [row["id"] for row in UNPRUNED]
RANDOM = [
    *evaluated("random", 0.9, [True, False, False, False], [2.0, 2.0, 4.0, 4.0], seed=0),
    *evaluated("random", 0.9, [False, False, True, False], [4.0, 4.0, 4.0, 4.0], seed=1),
]


class TestQuality:
    @pytest.fixture
    def table(self) -> pd.DataFrame:
        return quality_table(quality_cells([*UNPRUNED, *SDTP, *RANDOM]))

    def test_columns_and_cells(self) -> None:
        table = quality_table(quality_cells([*UNPRUNED, *SDTP]))
        assert list(table.columns) == QUALITY_COLUMNS
        assert list(zip(table["task"], table["metric"], table["method"], table["keep_ratio"], strict=True)) == [
            ("retrieval", "accuracy", "unpruned", 1.0),
            ("retrieval", "accuracy", "sdtp", 0.9),
            ("retrieval", "loss", "unpruned", 1.0),
            ("retrieval", "loss", "sdtp", 0.9),
            ("continuation", "loss", "unpruned", 1.0),
            ("continuation", "loss", "sdtp", 0.9),
        ]

    def test_accuracy(self, table: pd.DataFrame) -> None:
        row = only(table, task="retrieval", metric="accuracy", method="sdtp")
        assert row["value"] == 0.5
        assert row["retained"] == pytest.approx(0.5 / 0.75)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson_interval([1, 1, 0, 0]))
        assert only(table, task="retrieval", metric="accuracy", method="unpruned")["retained"] == 1.0

    def test_loss(self, table: pd.DataFrame) -> None:
        row = only(table, task="continuation", metric="loss", method="sdtp")
        assert row["value"] == pytest.approx(2.6)
        assert row["retained"] == pytest.approx(math.exp(-0.1))
        assert row["ci_low"] < 2.6 < row["ci_high"]

    def test_seeds_are_averaged_within_the_example(self, table: pd.DataFrame) -> None:
        accuracy = only(table, task="retrieval", metric="accuracy", method="random")
        loss = only(table, task="retrieval", metric="loss", method="random")
        assert accuracy["n"] == loss["n"] == 4  # examples, not rows
        assert accuracy["value"] == 0.25
        assert (accuracy["ci_low"], accuracy["ci_high"]) == pytest.approx(wilson_interval([0.5, 0, 0.5, 0]))
        assert loss["value"] == pytest.approx((3.0 + 3.0 + 4.0 + 4.0) / 4)

    def test_unpruned_without_a_hit_leaves_nothing_to_retain(self) -> None:
        missed = evaluated("unpruned", 1.0, [False] * 3, [1.0, 2.0, 3.0])
        table = quality_table(quality_cells([*missed, *evaluated("sdtp", 0.9, [True] * 3, [1.0] * 3)]))
        assert math.isnan(only(table, metric="accuracy", method="sdtp")["retained"])

    def test_differences_are_of_the_same_examples(self) -> None:
        shuffled = [*UNPRUNED, *SDTP[::-1], *RANDOM]
        differences = against_baselines(quality_cells(shuffled))
        assert set(differences) == {
            ("retrieval", "accuracy", "random", 0.9),
            ("retrieval", "loss", "random", 0.9),
            ("continuation", "loss", "random", 0.9),
        }
        difference = differences["continuation", "loss", "random", 0.9]
        assert difference.mean == pytest.approx(2.6 - 3.5)
        # Example by example -1.9, -0.9, -0.9, 0.1: 4 of the 16 sign patterns are as extreme.
        assert difference.p_value == pytest.approx(4 / 16)

    @pytest.mark.parametrize("rows", [SDTP, [*UNPRUNED, *SDTP[:-2]], [*UNPRUNED[2:], *SDTP]])
    def test_refuses_other_examples_than_the_unpruned_ones(self, rows: list[dict[str, Any]]) -> None:
        with pytest.raises(UserError, match=r"sdtp at keep ratio 0.9 .* all must be the same"):
            quality_cells(rows)

    def test_refuses_an_unknown_task(self) -> None:
        with pytest.raises(UserError, match=r"'summary'.*retrieval, continuation, instruction"):
            quality_cells([{**UNPRUNED[0], "task": "summary"}])


class TestCompleteness:
    def test_accepts_what_is_due(self) -> None:
        check_complete([*UNPRUNED, *SDTP, *RANDOM], ["unpruned", "sdtp", "random"], [0.9], IDS)

    def test_names_a_missing_job(self) -> None:
        with pytest.raises(UserError, match=r"\('sdtp', 0.8\)"):
            check_complete([*UNPRUNED, *SDTP], ["unpruned", "sdtp"], [0.9, 0.8], IDS)

    def test_names_missing_examples(self) -> None:
        with pytest.raises(UserError, match=r"sdtp at keep ratio 0.9 was evaluated on 7 examples, 7 of the 8"):
            check_complete([*UNPRUNED, *SDTP[1:]], ["unpruned", "sdtp"], [0.9], IDS)


def test_tables_can_be_read_by_figures_and_report(tmp_path: Any) -> None:
    write_csv(latency_table([FAST, SLOW]), tmp_path / "latency.csv")
    write_csv(quality_table(quality_cells([*UNPRUNED, *SDTP])), tmp_path / "quality.csv")
    assert read_latency(tmp_path / "latency.csv")["prefill_speedup"].tolist() == pytest.approx([1.0, 1.8, 2.5])
    assert read_quality(tmp_path / "quality.csv")["n"].tolist() == [4] * 6
