"""benchmarks/gpu.py: its numbers are what the repeats and the arithmetic say, and nothing stops a run half-way."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdtp.evaluation.latency import Samples, Timing
from sdtp.pipeline.results import LATENCY_COLUMNS
from sdtp.pruning import flops
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned, StageView

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
RATIOS = (0.9, 0.8, 0.7)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: waits and allocator peaks")


@pytest.fixture(scope="module")
def gpu(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("gpu")


@pytest.fixture(scope="module")
def parts(gpu: ModuleType) -> Callable[[str], ModuleType]:
    return lambda name: importlib.import_module(f"gpu_{name}")


@dataclasses.dataclass
class Run:
    process: subprocess.CompletedProcess[str]
    result: dict[str, Any]
    page: str

    @property
    def rows(self) -> dict[tuple[int, float | None], dict[str, Any]]:
        """By prompt tokens and keep ratio, None for unpruned."""
        return {
            (row["prompt_tokens"], None if row["method"] == "unpruned" else row["keep_ratio"]): row
            for row in self.result["rows"]
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("gpu")
    command = ["--config", "tiny", "--lengths", "64", "128", "--new-tokens", "4", "--repeats", "3"]
    process = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *command, "--out", folder / "r.json", "--markdown", folder / "r.md"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return Run(process, json.loads((folder / "r.json").read_text()), (folder / "r.md").read_text())


@pytest.mark.slow
class TestCommand:
    def test_says_what_it_was_measured_on_and_how(self, run: Run) -> None:
        result = run.result
        assert result["card"].startswith("CPU")
        assert result["driver"] is None
        assert result["versions"]["torch"] == torch.__version__
        assert {"python", "transformers", "sdtp"} < set(result["versions"])
        assert datetime.datetime.fromisoformat(result["date"]).tzinfo is not None
        assert result["command"].startswith("python benchmarks/gpu.py --config tiny --lengths 64 128 --new-tokens 4")
        if (ROOT / ".git").exists():
            head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
            assert result["commit"].split()[0] == head.stdout.strip()
        assert (result["config"], result["dtype"], result["attention"]) == ("tiny", "bfloat16", "sdpa")
        assert (result["new_tokens"], result["repeats"], result["warmup"]) == (4, 3, 1)

    def test_measures_every_arm_at_every_length(self, run: Run) -> None:
        assert list(run.rows) == list(itertools.product((64, 128), (None, *RATIOS)))
        assert run.result["left_out"] == []
        for row in run.rows.values():
            assert set(LATENCY_COLUMNS) < set(row)
            assert row["status"] == "measured"
            assert (row["new_tokens"], row["repeats"]) == (4, 3)
            numbers = [value for value in row.values() if isinstance(value, (int, float))]
            assert all(math.isfinite(value) for value in numbers)
            for name in ("prefill_s", "decode_s", "end_to_end_s", "cold_prefill_s", "peak_memory_bytes"):
                assert row[name] > 0

    def test_repeats_add_up(self, run: Run) -> None:
        for row in run.rows.values():
            samples = row["samples"]
            assert {len(values) for values in samples.values()} == {3}
            for prefill, decode, total in zip(
                samples["prefill_s"], samples["decode_s"], samples["end_to_end_s"], strict=True
            ):
                assert prefill + decode == pytest.approx(total)
            for name in ("prefill_s", "decode_s", "end_to_end_s"):
                assert row[name] == statistics.median(samples[name])

    @pytest.mark.parametrize(
        ("column", "top", "bottom"),
        [
            ("prefill_speedup", "prefill_s", "prefill_s"),
            ("decode_speedup", "decode_s", "decode_s"),
            ("end_to_end_speedup", "end_to_end_s", "end_to_end_s"),
            ("length_bound", "prefill_s", "ideal_s"),
        ],
    )
    def test_ratios_are_medians_of_pairs(self, run: Run, column: str, top: str, bottom: str) -> None:
        for tokens, ratio in itertools.product((64, 128), RATIOS):
            row, unpruned = run.rows[tokens, ratio], run.rows[tokens, None]
            pairs = sorted(a / b for a, b in zip(unpruned["samples"][top], row["samples"][bottom], strict=True))
            assert row[column] == pytest.approx(pairs[1])
            expected = [(pairs[0] + pairs[1]) / 2, pairs[1], (pairs[1] + pairs[2]) / 2]  # inclusive quartiles of three
            assert row["quartiles"][column] == pytest.approx(expected)

    def test_efficiencies(self, run: Run) -> None:
        for (_, ratio), row in run.rows.items():
            if ratio is not None:
                samples = row["samples"]
                pairs = [a / b for a, b in zip(samples["ideal_s"], samples["prefill_s"], strict=True)]
                assert row["efficiency"] == row["quartiles"]["efficiency"][1] == pytest.approx(statistics.median(pairs))
                assert row["flop_efficiency"] == pytest.approx(row["prefill_speedup"] / row["flop_bound"])

    def test_bounds_and_bytes_are_those_of_the_schedule(self, run: Run, gpu: ModuleType) -> None:
        config = gpu.CONFIGS["tiny"]()
        scorer = Learned(config.hidden_size, 2, width=128)
        for (tokens, ratio), row in run.rows.items():
            whole, schedule = flops.prefill(config, tokens), None
            if ratio is not None:
                schedule = PruningSchedule.geometric(8, start=4, step=3, ratio=ratio)
                assert json.loads(json.dumps(schedule.to_dict())) in run.result["schedules"]
                pruned = flops.prefill(config, tokens, schedule, scorer)
                assert row["flop_bound"] == pytest.approx(whole / pruned)
                assert row["prefill_tflop"] == pytest.approx(pruned / 1e12)
                scored = tokens + schedule.surviving(tokens)[0]
                assert row["scoring_tflop"] * 1e12 == pytest.approx(scored * 2 * (32 * 128 + 2 * 128))
                assert row["scoring_flop_share"] == pytest.approx(row["scoring_tflop"] / row["prefill_tflop"])
            held = [tokens] * 8 if schedule is None else schedule.layer_lengths(tokens, 8)
            assert row["kv_cache_bytes"] == sum(held) * 2 * 2 * 8 * 2  # keys and values, 2 heads of 8, bfloat16
            assert row["kept_tokens"] == held[-1]

    def test_rates_stand_beside_the_ceilings(self, run: Run) -> None:
        ceilings = run.result["ceilings"]
        for row in run.rows.values():
            assert row["prompt_tokens_per_s"] == pytest.approx(row["prompt_tokens"] / row["prefill_s"])
            achieved = row["prefill_tflop"] / row["prefill_s"]
            assert row["prefill_tflop_per_s"] == pytest.approx(achieved)
            assert row["matmul_fraction"] == pytest.approx(achieved / ceilings["matmul_tflop_per_s"])
            assert row["seconds_per_output_token"] == pytest.approx(row["decode_s"] / 3)
            weights = 2 * (run.result["parameters"] - 128 * 32)  # bfloat16, and one row of the embedding table
            rate = (weights + row["kv_cache_bytes"]) / row["seconds_per_output_token"] / 1e9
            assert row["decode_gb_per_s"] == pytest.approx(rate)
            assert row["copy_fraction"] == pytest.approx(rate / ceilings["copy_gb_per_s"])

    def test_scoring_has_its_own_line(self, run: Run) -> None:
        for (_, ratio), row in run.rows.items():
            if ratio is None:
                assert row["scoring_s"] == 0.0
                assert "scoring_share" not in row
            else:
                samples = row["samples"]
                pairs = [a / b for a, b in zip(samples["scoring_s"], samples["prefill_s"], strict=True)]
                over = [a - b for a, b in zip(samples["prefill_s"], samples["ideal_s"], strict=True)]
                assert row["scoring_s"] == statistics.median(samples["scoring_s"]) > 0
                assert row["scoring_share"] == pytest.approx(statistics.median(pairs))
                assert row["overhead_s"] == pytest.approx(statistics.median(over))
                assert row["overhead_share"] == pytest.approx(row["overhead_s"] / row["prefill_s"])

    def test_checks_that_need_cuda_say_so(self, run: Run) -> None:
        found = {check["check"]: (check["result"], check["detail"]) for check in run.result["checks"]}
        assert found == {
            "host-device synchronisations": ("skipped", "needs CUDA"),
            "peak memory falls with the schedule": ("skipped", "needs CUDA"),
            "KV cache bytes are those the schedule implies": ("passed", "8 rows"),
        }
        assert "skipped: host-device synchronisations (needs CUDA)" in run.process.stdout

    def test_page_shows_every_row(self, run: Run) -> None:
        page = run.page
        assert page.startswith(f"# tiny on {run.result['card']}, {run.result['date'][:10]}\n")
        assert f"torch {torch.__version__}" in page
        assert f"    {run.result['command']}\n" in page
        speed = page.split("## Speed and memory")[1].split("##")[0].strip().splitlines()
        assert len(speed) == 2 + 8
        assert len({line.count("|") for line in speed}) == 1
        row = run.rows[128, 0.8]
        cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (speed[0], speed[8])), strict=True))
        assert (cells["prompt"], cells["keep ratio"]) == ("128", "0.8")
        assert cells["prefill, s"].startswith(f"{row['prefill_s']:.4g} (")
        low, middle, high = row["quartiles"]["prefill_speedup"]
        assert cells["speedup"] == f"{middle:.2f} ({low:.2f}–{high:.2f})"
        assert cells["FLOP bound"] == f"{row['flop_bound']:.2f}"
        assert float(cells["KV cache, MB"]) == pytest.approx(row["kv_cache_bytes"] / 1e6, rel=1e-3)
        assert float(cells["peak memory, GB"]) == pytest.approx(row["peak_memory_bytes"] / 1e9, abs=0.005)
        choosing = page.split("## What choosing tokens costs")[1].split("##")[0].strip().splitlines()
        assert len(choosing) == 2 + 6
        assert "## Left out" not in page


def test_refuses_a_ratio_above_one(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--config", "tiny", "--ratios", "1.5", "--out", tmp_path / "r.json"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 2
    assert "ratio is 1.5: the fraction to keep must be in (0, 1]" in process.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2-7b", 7_615_616_512),
        ("qwen2.5-1.5b-like", 1_543_714_304),
        ("llama-3-8b-like", 8_030_261_248),
        ("mistral-7b-like", 7_248_023_552),
    ],
)
def test_shapes_have_as_many_parameters_as_their_models(gpu: ModuleType, name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(gpu.CONFIGS[name]())
    assert model.num_parameters() == parameters


def step_clock() -> Callable[[], float]:
    """A second passes at each reading."""
    return itertools.count().__next__


class TestCeilings:
    def test_count_operations_and_bytes(self, gpu: ModuleType, parts: Callable[[str], ModuleType]) -> None:
        model = gpu.build_model("tiny", torch.float32, CPU)
        found = parts("measure").ceilings(model, tokens=16, repeats=2, clock=step_clock())
        products = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64  # queries, keys and values, output, gated MLP
        # Every timed pass took the one second between its two readings, and did its work five times.
        assert found["matmul_tflop_per_s"] == pytest.approx(5 * 2 * 16 * products / 1e12)
        assert found["copy_gb_per_s"] == pytest.approx(5 * 2 * found["copy_bytes"] / 1e9)
        assert found["matmul_shapes"] == [[32, 32], [16, 32], [16, 32], [32, 32], [64, 32], [64, 32], [32, 64]]


LENGTHS = (64, 128, 192)


@pytest.fixture
def bench(gpu: ModuleType, parts: Callable[[str], ModuleType]) -> Any:
    """The tiny model with the three ratios; a budget that never ends, ceilings of one operation and byte a second."""
    measure = parts("measure")
    model = gpu.build_model("tiny", torch.float32, CPU)
    pruners = gpu.build_pruners(model.config, RATIOS, CPU)
    arms = [(None, None), *pruners.items()]
    work = {(n, ratio): measure.work_of(model, n, pruner) for n in LENGTHS for ratio, pruner in arms}
    weights = measure.decode_weight_bytes(model)
    return measure.Bench(model, pruners, work, 3, 2, measure.Budget(math.inf, lambda: 0.0), 1.0, 1.0, weights)


@pytest.fixture
def run_lengths(parts: Callable[[str], ModuleType]) -> Callable[..., tuple[list[Any], list[dict[str, Any]]]]:
    def run(bench: Any, *lengths: int) -> tuple[list[Any], list[dict[str, Any]]]:
        last: list[Any] = []
        parts("measure").run_lengths(bench, lengths, lambda measured, left_out: last.append((measured, left_out)))
        assert len(last) == len(lengths)  # results are handed over after each length
        return last[-1]

    return run


def limit_memory(model: PreTrainedModel, tokens: int, error: Exception) -> list[int]:
    """The last layer's MLP has memory for so many tokens; returns the lengths it had none for, as they come up."""
    refused: list[int] = []

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > tokens:
            refused.append(args[0].shape[1])
            raise error

    model.model.layers[-1].mlp.register_forward_pre_hook(hook)
    return refused


class TestMemory:
    def test_arm_that_does_not_fit_is_recorded_and_the_others_go_on(
        self, bench: Any, run_lengths: Callable[..., Any], parts: Callable[[str], ModuleType]
    ) -> None:
        refused = limit_memory(bench.model, 100, torch.OutOfMemoryError("CUDA out of memory"))
        measured, left_out = run_lengths(bench, *LENGTHS)
        # Unpruned and 0.9, pruned and at its length bound, at 128; 0.8 at 192: each once, and not again at 192.
        assert refused == [128, 104, 104, 123, 123]
        rows = [row for one in measured for row in parts("rows").rows_of(bench, one)]
        status = {
            (row["prompt_tokens"], "unpruned" if row["method"] == "unpruned" else row["keep_ratio"]): row["status"]
            for row in rows
        }
        fits, lost = "measured", "out of memory"
        assert status == {
            (64, "unpruned"): fits, (64, 0.9): fits, (64, 0.8): fits, (64, 0.7): fits,
            (128, "unpruned"): lost, (128, 0.9): lost, (128, 0.8): fits, (128, 0.7): fits,
            (192, 0.8): lost, (192, 0.7): fits,
        }  # fmt: skip
        assert left_out == [
            {"prompt_tokens": 192, "keep_ratio": ratio, "reason": "out of memory at 128 tokens already"}
            for ratio in ("unpruned", 0.9)
        ]
        by_arm = {(row["prompt_tokens"], row["keep_ratio"]): row for row in rows}
        alone = by_arm[128, 0.8]
        assert math.isnan(alone["prefill_speedup"])
        assert math.isnan(alone["end_to_end_speedup"])
        assert alone["prefill_s"] > 0
        assert alone["efficiency"] > 0  # needs the length bound alone
        assert alone["flop_bound"] == pytest.approx(by_arm[128, 1.0]["prefill_tflop"] / alone["prefill_tflop"])
        nothing = by_arm[128, 0.9]
        assert nothing["prefill_s"] is None
        assert nothing["peak_memory_bytes"] is None
        assert nothing["flop_bound"] > 1

    def test_page_names_what_did_not_fit(
        self, bench: Any, run_lengths: Callable[..., Any], parts: Callable[[str], ModuleType]
    ) -> None:
        limit_memory(bench.model, 100, torch.OutOfMemoryError("CUDA out of memory"))
        measured, _ = run_lengths(bench, 128)
        rows = parts("rows").plain([row for one in measured for row in parts("rows").rows_of(bench, one)])
        json.dumps(rows, allow_nan=False)
        lines = parts("page").table(rows, parts("page").SPEED)
        assert lines[2].startswith("| 128 | unpruned | out of memory |  | 1.00 |")
        assert lines[3].startswith("| 128 | 0.9 | out of memory |")
        assert lines[2].endswith("|  |  |")  # neither cache nor peak
        assert "nan" not in "".join(lines)

    def test_other_errors_are_not_taken_for_it(self, bench: Any, run_lengths: Callable[..., Any]) -> None:
        limit_memory(bench.model, 100, RuntimeError("device-side assert"))
        with pytest.raises(RuntimeError, match="device-side assert"):
            run_lengths(bench, 128)

    def test_model_is_left_without_hooks(self, bench: Any, run_lengths: Callable[..., Any]) -> None:
        limit_memory(bench.model, 100, torch.OutOfMemoryError("CUDA out of memory"))
        run_lengths(bench, 192)
        assert not any(layer._forward_pre_hooks for layer in bench.model.model.layers)
        assert not bench.model._forward_hooks


class TestBudget:
    def test_prediction_scales_prefill_with_operations_and_decode_with_bytes(
        self, bench: Any, parts: Callable[[str], ModuleType]
    ) -> None:
        measure = parts("measure")
        seen = Samples(Timing(99.0, 99.0, 3), [Timing(2.0, 7.0, 3), Timing(2.0, 7.0, 3)])
        one = measure.Measured(64, [], dict.fromkeys(measure.arms_of([0.9]), seen), {}, [])
        known = dict.fromkeys(one.samples, one)
        assert measure.predicted_seconds(bench, 64, [0.9], known) == pytest.approx(3 * 4 * 7.0)
        config, pruner = bench.model.config, bench.pruners[0.9]
        weights = 4 * (bench.model.num_parameters() - 128 * 32)
        expected = 0.0
        for plan, scorer in ((None, None), *[(pruner.schedule, pruner.scorer)] * 3):
            operations = [flops.prefill(config, n, plan, scorer) for n in (128, 64)]
            read = [weights + flops.cache_bytes(config, n, plan, 4) for n in (128, 64)]
            expected += 2.0 * operations[0] / operations[1] + 5.0 * read[0] / read[1]
        assert measure.predicted_seconds(bench, 128, [0.9], known) == pytest.approx(3 * expected)

    def test_prediction_of_what_was_never_run_is_at_the_ceilings(
        self, bench: Any, parts: Callable[[str], ModuleType]
    ) -> None:
        config, pruner = bench.model.config, bench.pruners[0.8]
        schedule, scorer = pruner.schedule, pruner.scorer
        whole, pruned = flops.prefill(config, 64), flops.prefill(config, 64, schedule, scorer)
        weights = 4 * (bench.model.num_parameters() - 128 * 32)
        steps = 2 * (2 * weights + flops.cache_bytes(config, 64) + flops.cache_bytes(config, 64, schedule))
        expected = 3 * (whole + 2 * pruned + flops.scoring(64, schedule, scorer) + steps)
        assert parts("measure").predicted_seconds(bench, 64, [0.8], {}) == pytest.approx(expected)

    def test_ratios_that_do_not_fit_are_left_out_and_named(
        self, bench: Any, run_lengths: Callable[..., Any], parts: Callable[[str], ModuleType]
    ) -> None:
        measure = parts("measure")
        two, three = (measure.predicted_seconds(bench, 64, RATIOS[:count], {}) for count in (2, 3))
        budget = measure.Budget(two + 1, lambda: 0.0)
        measured, left_out = run_lengths(dataclasses.replace(bench, budget=budget), 64)
        assert measured[0].ratios == [0.9, 0.8]
        reason = f"time budget: {three:.0f} s predicted, {two + 1:.0f} s left"
        assert left_out == [{"prompt_tokens": 64, "keep_ratio": 0.7, "reason": reason}]

    def test_lengths_that_do_not_fit_are_left_out_whole_and_shorter_ones_still_run(
        self, bench: Any, run_lengths: Callable[..., Any], parts: Callable[[str], ModuleType]
    ) -> None:
        measure = parts("measure")
        budget = measure.Budget(measure.predicted_seconds(bench, 64, RATIOS, {}), lambda: 0.0)
        measured, left_out = run_lengths(dataclasses.replace(bench, budget=budget), 192, 64)
        assert [(one.tokens, one.ratios) for one in measured] == [(64, [0.9, 0.8, 0.7])]
        assert [(row["prompt_tokens"], row["keep_ratio"]) for row in left_out] == [
            (192, name) for name in ("unpruned", 0.9, 0.8, 0.7)
        ]
        assert all(row["reason"].startswith("time budget") for row in left_out)

    def test_no_pass_begins_after_its_end(
        self, bench: Any, run_lengths: Callable[..., Any], parts: Callable[[str], ModuleType]
    ) -> None:
        clock = itertools.chain([0.0] * 20, itertools.repeat(1e9))
        fast = dataclasses.replace(
            bench,
            budget=parts("measure").Budget(100.0, clock.__next__),
            matmul_flop_per_s=1e15,
            copy_byte_per_s=1e15,
        )
        prefills = []
        bench.model.register_forward_pre_hook(
            lambda module, args, kwargs: prefills.append(kwargs["input_ids"].shape[1] > 1), with_kwargs=True
        )
        measured, left_out = run_lengths(fast, 64, 128)
        assert measured == []
        assert 0 < sum(prefills) < 7 * 3  # seven arms with a prefill, three rounds
        assert [row["keep_ratio"] for row in left_out] == ["unpruned", 0.9, 0.8, 0.7] * 2
        assert left_out[0]["reason"] == "time budget of 100 s"
        assert left_out[-1]["reason"].startswith("time budget: ")


def peaks(*values: int | None) -> list[dict[str, Any]]:
    """Rows of one length: the unpruned peak first, then that of each ratio."""
    names = [("unpruned", 1.0), *(("sdtp", ratio) for ratio in RATIOS)]
    return [
        {"method": method, "keep_ratio": ratio, "prompt_tokens": 64, "peak_memory_bytes": value}
        for (method, ratio), value in zip(names, values, strict=True)
    ]


class TestChecks:
    @pytest.mark.parametrize(
        ("rows", "result"),
        [
            (peaks(40 << 20, 30 << 20, 20 << 20, 10 << 20), "passed"),
            (peaks(40 << 20, 30 << 20, 30 << 20, 30 << 20), "passed"),  # the peak lies before the first stage
            (peaks(40 << 20, 40 << 20, 40 << 20, 40 << 20), "failed"),
            (peaks(40 << 20, 30 << 20, 32 << 20, 10 << 20), "failed"),
            (peaks(40 << 20, 42 << 20, 20 << 20, 10 << 20), "failed"),
            (peaks(None, 30 << 20, 30 << 20, 20 << 20), "passed"),
        ],
    )
    def test_peak_memory(self, parts: Callable[[str], ModuleType], rows: list[dict[str, Any]], result: str) -> None:
        (check,) = parts("checks").check_peak_memory(rows)
        assert check["result"] == result
        assert "0.7: " in check["detail"]

    def test_cache_that_holds_more_than_its_schedule_is_named(
        self, bench: Any, parts: Callable[[str], ModuleType]
    ) -> None:
        implied = {ratio: bench.work[64, ratio].kv_cache_bytes for ratio in (None, 0.9)}
        rows = [
            {"method": "unpruned", "keep_ratio": 1.0, "prompt_tokens": 64, "kv_cache_bytes": implied[None]},
            {"method": "sdtp", "keep_ratio": 0.9, "prompt_tokens": 64, "kv_cache_bytes": implied[0.9]},
        ]
        assert parts("checks").check_cache(bench, rows)["result"] == "passed"
        rows[1]["kv_cache_bytes"] = implied[None]
        check = parts("checks").check_cache(bench, rows)
        assert check["result"] == "failed"
        assert f"64 tokens at 0.9: {implied[None]}, not {implied[0.9]}" in check["detail"]

    @needs_cuda
    def test_scorer_that_reads_at_each_stage_is_caught(
        self, gpu: ModuleType, parts: Callable[[str], ModuleType]
    ) -> None:
        device = torch.device("cuda")

        class Reading(Learned):
            def score(self, view: StageView) -> torch.Tensor:
                scores = super().score(view)
                return scores * (1.0 if scores.sum().item() else 0.5)

        model = gpu.build_model("tiny", torch.bfloat16, device)
        pruner = gpu.build_pruners(model.config, [0.8], device)[0.8]
        checks = parts("checks").check_synchronisations(model, pruner, 256)
        assert [check["result"] for check in checks] == ["passed", "passed"], checks
        reading = TokenPruner(pruner.schedule, Reading(32, pruner.schedule.stages).to(device))
        checks = parts("checks").check_synchronisations(model, reading, 256)
        assert [check["result"] for check in checks] == ["failed", "failed"], checks
        assert "test_benchmarks.py" in checks[0]["detail"]

    @needs_cuda
    def test_whole_run_on_the_card(self, tmp_path: Path) -> None:
        command = ["--config", "tiny", "--lengths", "1024", "4096", "--new-tokens", "4", "--repeats", "3", "--out"]
        process = subprocess.run(
            [sys.executable, "benchmarks/gpu.py", *command, tmp_path / "r.json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        result = json.loads((tmp_path / "r.json").read_text())
        assert {check["result"] for check in result["checks"]} == {"passed"}
        assert result["driver"]
        assert result["card"] == torch.cuda.get_device_name()
