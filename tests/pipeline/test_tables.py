"""The tables of made-up measurements, against numbers worked out by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from sdtp.errors import UserError
from sdtp.evaluation.stats import mean_interval, wilson_interval
from sdtp.pipeline.results import (
    COMPARISON_COLUMNS,
    LATENCY_COLUMNS,
    QUALITY_COLUMNS,
    read_comparisons,
    read_latency,
    read_quality,
    verdict,
)
from sdtp.pipeline.steps.tables import check_complete, write_csv
from sdtp.pipeline.tables import comparison_table, efficiency, latency_table, quality_cells, quality_table
from tests.pipeline.rows import only


def said(row: pd.Series) -> str:
    return verdict(row["metric"], row["ci_low"], row["ci_high"], row["p_value"])


def arm(method: str, prefill: list[float], flop: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "prompt_tokens": 512,
        "new_tokens": 16,
        "prefill_s": prefill,
        "decode_s": [0.5] * len(prefill),
        "end_to_end_s": [seconds + 0.5 for seconds in prefill],
        "peak_memory_bytes": [900, 910, 890],
        "kv_cache_bytes": 100,
        "prefill_flop": flop,
        "cold_s": 99.0,
        "kept_tokens": 512,
        **more,
    }


def job(
    ratio: float, unpruned: list[float], pruned: list[float], ideal: list[float], decode: tuple[float, float]
) -> dict[str, Any]:
    """`decode`: seconds of every decode of the unpruned and of the pruned arm."""
    rows = []
    for method, prefill, seconds in (("unpruned", unpruned, decode[0]), ("sdtp", pruned, decode[1])):
        times = {"decode_s": [seconds] * len(prefill), "end_to_end_s": [first + seconds for first in prefill]}
        rows.append(arm(method, prefill, 8e12 if method == "unpruned" else 4e12, **times))
    rows[1] |= {"ideal_s": ideal, "kv_cache_bytes": 60, "cold_s": 77.0, "kept_tokens": 373, "scoring_flop": 3e10}
    rows[1] |= {"scoring_s": [0.01, 0.02, 0.04, 0.03, 9.0]}
    return {"keep_ratio": ratio, "rows": rows}


# The machine was half as fast during the second job: a speedup across jobs would be nonsense.
FAST = job(0.9, [2.0, 2.2, 1.8, 2.0, 2.0], [1.0, 1.0, 1.0, 1.25, 1.6], [0.8, 0.9, 0.95, 1.0, 1.6], (0.5, 0.5))
SLOW = job(0.8, [4.0, 4.0, 4.0, 4.4, 4.0], [1.6, 2.0, 1.6, 2.0, 1.0], [1.6, 1.6, 1.6, 1.6, 1.0], (1.0, 0.8))


class TestLatency:
    @pytest.fixture
    def table(self) -> pd.DataFrame:
        return latency_table([FAST, SLOW])

    def test_columns_are_the_contracts(self) -> None:
        table = latency_table([FAST])
        assert list(table.columns) == LATENCY_COLUMNS
        # What others read by place stays in place; new columns come after.
        assert list(table.columns[:19]) == [
            "method", "keep_ratio", "prompt_tokens", "new_tokens", "prefill_s", "prefill_q25", "prefill_q75",
            "decode_s", "end_to_end_s", "repeats", "prefill_tflop", "flop_bound", "length_bound", "prefill_speedup",
            "speedup_q25", "efficiency", "flop_efficiency", "peak_memory_bytes", "kv_cache_bytes",
        ]  # fmt: skip

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

    def test_speedups_of_decode_and_of_the_whole_are_of_the_same_job(self, table: pd.DataFrame) -> None:
        fast, slow = only(table, keep_ratio=0.9), only(table, keep_ratio=0.8)
        # Paired: 2.5, 2.7, 2.3, 2.5, 2.5 over 1.5, 1.5, 1.5, 1.75, 2.1. Pooled medians would give 3.85 / 1.5 = 2.57.
        assert fast["end_to_end_speedup"] == pytest.approx(2.3 / 1.5)
        assert fast["decode_speedup"] == pytest.approx(1.0)  # 0.75 / 0.5 = 1.5 across jobs
        # Paired: 5.0, 5.0, 5.0, 5.4, 5.0 over 2.4, 2.8, 2.4, 2.8, 1.8.
        assert slow["end_to_end_speedup"] == pytest.approx(5.0 / 2.4)
        assert slow["decode_speedup"] == pytest.approx(1.25)
        unpruned = only(table, method="unpruned")
        assert (unpruned["end_to_end_speedup"], unpruned["decode_speedup"]) == (1.0, 1.0)

    def test_overhead_is_paired(self, table: pd.DataFrame) -> None:
        # 0.2, 0.1, 0.05, 0.25, 0.0; the difference of the medians 1.0 and 0.95 would be 0.05.
        assert only(table, keep_ratio=0.9)["overhead_s"] == pytest.approx(0.1)
        assert only(table, keep_ratio=0.8)["overhead_s"] == pytest.approx(0.0)  # 0.0, 0.4, 0.0, 0.4, 0.0
        assert only(table, method="unpruned")["overhead_s"] == 0.0

    def test_scoring_is_the_median_of_its_own_times(self, table: pd.DataFrame) -> None:
        assert only(table, keep_ratio=0.9)["scoring_s"] == 0.03
        assert only(table, method="unpruned")["scoring_s"] == 0.0

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
        assert row["kept_tokens"] == 373
        assert row["scoring_tflop"] == pytest.approx(0.03)
        unpruned = only(table, method="unpruned")
        assert (unpruned["kept_tokens"], unpruned["scoring_tflop"]) == (512, 0.0)

    def test_cold_time_is_in_its_own_column_and_in_no_other(self, table: pd.DataFrame) -> None:
        assert table["cold_prefill_s"].tolist() == [99.0, 77.0, 77.0]
        times = table.drop(columns=["cold_prefill_s"]).filter(regex="_s$|_q|speedup|bound|efficiency")
        assert times.shape[1] == 15
        assert times.max().max() < 6

    def test_what_was_not_measured_stays_empty(self) -> None:
        rows = [
            arm("unpruned", [2.0], 8e12, decode_s=[None], peak_memory_bytes=[None] * 3, new_tokens=1),
            arm(
                "sdtp",
                [1.0],
                4e12,
                decode_s=[None],
                peak_memory_bytes=[None] * 3,
                new_tokens=1,
                ideal_s=[1.0],
                scoring_flop=1e9,
                scoring_s=[0.1],
            ),
        ]
        table = latency_table([{"keep_ratio": 0.9, "rows": rows}])
        assert table["decode_s"].isna().all()
        assert table["decode_speedup"].isna().all()
        assert table["end_to_end_speedup"].tolist() == pytest.approx([1.0, 2.5 / 1.5])
        assert table["peak_memory_bytes"].isna().all()
        assert table["peak_memory_ratio"].isna().all()

    def test_memory_is_compared_within_the_job_and_the_round(self) -> None:
        # The processes differ in what they hold beside the model, by more than pruning saves.
        small, large = ({"keep_ratio": job["keep_ratio"], "rows": [*map(dict, job["rows"])]} for job in (FAST, SLOW))
        small["rows"][0]["peak_memory_bytes"], small["rows"][1]["peak_memory_bytes"] = [900, 1000, 800], [855, 900, 880]
        large["rows"][0]["peak_memory_bytes"], large["rows"][1]["peak_memory_bytes"] = [2000] * 3, [1500, 1600, 1800]
        table = latency_table([small, large])
        unpruned = only(table, method="unpruned")
        assert (unpruned["peak_memory_bytes"], unpruned["peak_memory_ratio"]) == (1500, 1.0)
        assert table.loc[table["method"] == "sdtp", "peak_memory_bytes"].tolist() == [880, 1600]
        # Paired: 0.95, 0.9, 1.1; the job's medians would give 880 / 900, and the pooled one 880 / 1500.
        assert only(table, keep_ratio=0.9)["peak_memory_ratio"] == pytest.approx(0.95)
        assert only(table, keep_ratio=0.8)["peak_memory_ratio"] == pytest.approx(0.8)

    def test_refuses_jobs_of_different_lengths(self) -> None:
        other = {"keep_ratio": 0.8, "rows": [{**row, "prompt_tokens": 1024} for row in SLOW["rows"]]}
        with pytest.raises(UserError, match=r"keep ratio 0.9.*\[512, 1024\]"):
            latency_table([FAST, other])

    def test_refuses_lists_that_are_not_paired(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            latency_table([job(0.9, [2.0, 2.0], [1.0], [1.0], (0.5, 0.5))])


def evaluated(
    method: str, ratio: float, correct: list[bool], losses: list[float], seed: int | None = None
) -> list[dict[str, Any]]:
    """Rows of retrieval examples r0, r1, ... and of continuation examples c0, c1, ... with the same losses.

    A method that prunes is off by an eighth of the loss, and agrees on half of example 0's tokens alone.
    """
    identity = {"method": method, "keep_ratio": ratio, "seed": seed}
    rows = []
    pruned = method != "unpruned"
    for index, (right, loss) in enumerate(zip(correct, losses, strict=True)):
        same = identity | {"kl": loss / 8 if pruned else 1e-9, "top1": (0.0 if index else 0.5) if pruned else 1.0}
        rows.append({"id": f"r{index}", "task": "retrieval", "correct": right, "loss": loss, **same})
        rows.append({"id": f"c{index}", "task": "continuation", "correct": None, "loss": loss, **same})
    return rows


UNPRUNED = evaluated("unpruned", 1.0, [True, True, True, False], [1.0, 2.0, 3.0, 4.0])
SDTP = evaluated("sdtp", 0.9, [True, True, False, False], [1.1, 2.1, 3.1, 4.1])
IDS = [row["id"] for row in UNPRUNED]
RANDOM = [
    *evaluated("random", 0.9, [True, False, False, False], [2.0, 2.0, 4.0, 4.0], seed=0),
    *evaluated("random", 0.9, [False, False, True, False], [4.0, 4.0, 4.0, 4.0], seed=1),
]


PANELS = [
    *(("retrieval", metric) for metric in ("accuracy", "loss", "kl", "top1")),
    *(("continuation", metric) for metric in ("loss", "kl", "top1")),
]


class TestQuality:
    @pytest.fixture
    def table(self) -> pd.DataFrame:
        return quality_table(quality_cells([*UNPRUNED, *SDTP, *RANDOM]))

    def test_columns_and_cells(self) -> None:
        table = quality_table(quality_cells([*UNPRUNED, *SDTP]))
        assert list(table.columns) == QUALITY_COLUMNS
        assert list(zip(table["task"], table["metric"], table["method"], table["keep_ratio"], strict=True)) == [
            (*panel, *arm) for panel in PANELS for arm in (("unpruned", 1.0), ("sdtp", 0.9))
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

    def test_agreement_with_the_unpruned_model(self, table: pd.DataFrame) -> None:
        kl = only(table, task="continuation", metric="kl", method="sdtp")
        assert kl["value"] == pytest.approx(2.6 / 8)
        assert (kl["ci_low"], kl["ci_high"]) == mean_interval([1.1 / 8, 2.1 / 8, 3.1 / 8, 4.1 / 8])
        itself = only(table, task="continuation", metric="kl", method="unpruned")
        assert (itself["value"], itself["ci_low"], itself["ci_high"]) == (1e-9, 1e-9, 1e-9)
        # What is but rounding is nothing of which a share could be kept.
        assert math.isnan(kl["retained"])
        assert math.isnan(itself["retained"])
        for task, interval in (("continuation", mean_interval), ("retrieval", wilson_interval)):
            top1 = only(table, task=task, metric="top1", method="sdtp")
            assert (top1["value"], top1["retained"]) == (0.125, 0.125)
            assert (top1["ci_low"], top1["ci_high"]) == pytest.approx(interval([0.5, 0.0, 0.0, 0.0]))
            assert only(table, task=task, metric="top1", method="unpruned")["value"] == 1.0

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

    @pytest.mark.parametrize("rows", [SDTP, [*UNPRUNED, *SDTP[:-2]], [*UNPRUNED[2:], *SDTP]])
    def test_refuses_other_examples_than_the_unpruned_ones(self, rows: list[dict[str, Any]]) -> None:
        with pytest.raises(UserError, match=r"sdtp at keep ratio 0.9 .* all must be the same"):
            quality_cells(rows)

    def test_refuses_an_unknown_task(self) -> None:
        with pytest.raises(UserError, match=r"'summary'.*retrieval, continuation, instruction"):
            quality_cells([{**UNPRUNED[0], "task": "summary"}])


class TestComparisons:
    def test_columns_and_pairs(self) -> None:
        table = comparison_table(quality_cells([*UNPRUNED, *SDTP, *RANDOM]))
        assert list(table.columns) == COMPARISON_COLUMNS
        pairs = [("sdtp", "unpruned", 0.9), ("random", "unpruned", 0.9), ("sdtp", "random", 0.9)]
        keys = table[["task", "metric", "method", "other", "keep_ratio"]].itertuples(index=False, name=None)
        assert list(keys) == [(*panel, *pair) for panel in PANELS for pair in pairs]
        assert set(table["n"]) == {4}  # examples, not rows

    def test_a_shift_that_the_spread_of_examples_hides_is_worse(self) -> None:
        # Losses from 1 to 6 nats, of which pruning adds some 0.1 to each: far inside the interval of either mean.
        easy_to_hard = [1 + 5 * index / 27 for index in range(28)]
        shifted = [loss + 0.1 + 0.02 * math.sin(index) for index, loss in enumerate(easy_to_hard)]
        cells = quality_cells(
            [
                *evaluated("unpruned", 1.0, [True] * 28, easy_to_hard),
                *evaluated("sdtp", 0.9, [True] * 28, shifted),
                *evaluated("recent", 0.9, [True] * 28, [loss + 0.3 for loss in easy_to_hard]),
            ]
        )
        quality = only(quality_table(cells), task="continuation", metric="loss", method="unpruned")
        assert quality["ci_low"] < 3.6 < quality["ci_high"]
        table = comparison_table(cells)
        row = only(table, task="continuation", metric="loss", method="sdtp", other="unpruned")
        assert row["mean"] == pytest.approx(0.1, abs=0.01)
        assert said(row) == "worse"
        assert said(only(table, task="continuation", metric="loss", other="recent")) == "better"
        # Further from the unpruned model, the lower divergence is the better one.
        assert said(only(table, task="continuation", metric="kl", other="recent")) == "better"
        # A constant shift has no spread at all; equal values show no difference.
        assert said(only(table, task="continuation", metric="loss", method="recent")) == "worse"
        assert said(only(table, metric="accuracy", other="recent")) == "no difference shown"

    def test_differences_are_of_the_same_examples_with_seeds_averaged_first(self) -> None:
        table = comparison_table(quality_cells([*UNPRUNED, *SDTP[::-1], *RANDOM]))
        row = only(table, task="continuation", metric="loss", method="sdtp", other="random")
        assert row["mean"] == pytest.approx(2.6 - 3.5)
        # Example by example -1.9, -0.9, -0.9, 0.1: 4 of the 16 sign patterns are as extreme.
        assert row["p_value"] == pytest.approx(4 / 16)

    def test_p_values_are_adjusted_within_their_task_and_metric(self) -> None:
        table = comparison_table(quality_cells([*UNPRUNED, *SDTP, *RANDOM]))
        family = table[(table["task"] == "continuation") & (table["metric"] == "loss")].set_index(["method", "other"])
        # SDTP - unpruned is 0.1 four times: 2 of 16 sign patterns; Random - unpruned is 2, 1, 1, 0: 4 of 16.
        assert family["p_value"].to_dict() == pytest.approx(
            {("sdtp", "unpruned"): 2 / 16, ("random", "unpruned"): 4 / 16, ("sdtp", "random"): 4 / 16}
        )
        assert family["p_holm"].to_dict() == pytest.approx(
            {("sdtp", "unpruned"): 6 / 16, ("random", "unpruned"): 8 / 16, ("sdtp", "random"): 8 / 16}
        )


class TestCompleteness:
    @staticmethod
    def check(rows: list[dict[str, Any]], ratios: Sequence[float] = (0.9,), seeds: Sequence[int] = (0, 1)) -> None:
        check_complete(rows, list(dict.fromkeys(row["method"] for row in rows)), ratios, seeds, IDS)

    def test_accepts_what_is_due(self) -> None:
        self.check([*UNPRUNED, *SDTP, *RANDOM])

    def test_names_a_missing_job(self) -> None:
        with pytest.raises(UserError, match=r"\('sdtp', 0.8\)"):
            self.check([*UNPRUNED, *SDTP], ratios=[0.9, 0.8])

    def test_names_a_missing_example(self) -> None:
        with pytest.raises(UserError, match=r"sdtp at keep ratio 0.9 has no row for 1 of 8 .* 'r0' with seed None"):
            self.check([*UNPRUNED, *SDTP[1:]])

    def test_names_a_seed_that_one_example_lacks(self) -> None:
        with pytest.raises(UserError, match=r"random at keep ratio 0.9 has no row for 1 of 16 .* 'c3' with seed 1 .*"):
            self.check([*UNPRUNED, *SDTP, *RANDOM[:-1]])

    def test_names_seeds_that_were_not_asked_for(self) -> None:
        with pytest.raises(UserError, match=r"has no row for 8 of 16 .* seed 2 .*each seed of \[0, 2\] is needed"):
            self.check([*UNPRUNED, *RANDOM], seeds=[0, 2])

    @pytest.mark.parametrize("twice", [SDTP[3], RANDOM[5], UNPRUNED[0], {**SDTP[3], "id": "r9"}])
    def test_names_a_row_too_many(self, twice: dict[str, Any]) -> None:
        with pytest.raises(
            UserError, match=rf"{twice['method']} at keep ratio .* has a row too many .* '{twice['id']}'"
        ):
            self.check([*UNPRUNED, *SDTP, *RANDOM, twice])


def test_tables_can_be_read_by_figures_and_report(tmp_path: Any) -> None:
    cells = quality_cells([*UNPRUNED, *SDTP])
    write_csv(latency_table([FAST, SLOW]), tmp_path / "latency.csv")
    write_csv(quality_table(cells), tmp_path / "quality.csv")
    write_csv(comparison_table(cells), tmp_path / "comparisons.csv")
    assert read_latency(tmp_path / "latency.csv")["prefill_speedup"].tolist() == pytest.approx([1.0, 1.8, 2.5])
    quality = read_quality(tmp_path / "quality.csv")
    assert quality["n"].tolist() == [4] * 2 * len(PANELS)
    assert len(read_comparisons(tmp_path / "comparisons.csv", quality)) == len(PANELS)
