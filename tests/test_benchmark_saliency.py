"""benchmarks/saliency.py: its reference computes what saliency is made of, and its rows say what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("saliency")


@pytest.mark.slow
def test_rows_have_both_arms_of_each_shape(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ["--lengths", "40", "48", "--batches", "1", "3", "--response-tokens", "5", "--repeats", "5"]
    monkeypatch.setattr(
        sys, "argv", ["saliency", "tiny", *shapes, "--device", "cpu", "--out", str(tmp_path / "r.json")]
    )
    monkeypatch.setattr(benchmark, "TARGET", 1e9)  # so small a model on a busy machine is no measure of it
    assert benchmark.main() == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["layers"] == [4, 7]
    assert [(row["tokens"], row["batch"], row["checkpointing"]) for row in result["rows"]] == [
        (tokens, batch, checkpointing) for tokens in (40, 48) for batch in (1, 3) for checkpointing in (False, True)
    ]
    for row in result["rows"]:
        assert row["ratio"]["q25"] <= row["ratio"]["median"] <= row["ratio"]["q75"]
        assert 0.2 < row["ratio"]["median"] < 5
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["tokens"] / row["seconds"])


@pytest.mark.parametrize(("target", "status"), [(1e-9, 1), (1e9, 0)])
def test_shape_above_the_target_is_named_and_fails(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: float,
    status: int,
) -> None:
    shapes = ["--lengths", "12", "--batches", "2", "--response-tokens", "3", "--repeats", "2"]
    monkeypatch.setattr(
        sys, "argv", ["saliency", "tiny", *shapes, "--device", "cpu", "--out", str(tmp_path / "r.json")]
    )
    monkeypatch.setattr(benchmark, "TARGET", target)
    assert benchmark.main() == status
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("above the target of 0.00: ")]
    shown = [f"above the target of 0.00: 12 tokens x 2, {how}, ratio " for how in ("plain", "checkpointing")]
    assert [line.rpartition(" ")[0] + " " for line in found] == shown * status
    # Written all the same.
    assert json.loads((tmp_path / "r.json").read_text())["target_ratio"] == target


@pytest.mark.parametrize("fault", ["another stage", "mean over the batch"])
def test_a_reference_that_computes_something_else_is_noticed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    model = benchmark.load("tiny", "float32", "cpu")
    prompts, responses = list(torch.randint(3, 512, (2, 20))), list(torch.randint(3, 512, (2, 4)))
    benchmark.check(model, prompts, responses, (4, 7))
    true = benchmark.reference
    if fault == "another stage":
        monkeypatch.setattr(benchmark, "reference", lambda *args: true(*args[:3], (5, 7), False))
    else:
        monkeypatch.setattr(benchmark, "reference", lambda *args: true(*args) / 2)
    with pytest.raises(RuntimeError, match="the reference computes something else"):
        benchmark.check(model, prompts, responses, (4, 7))
