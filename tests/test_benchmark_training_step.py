"""benchmarks/training_step.py: a table of what a step keeps, with the formula of docs/training.md beside it."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (256, 512)


@pytest.fixture(scope="module")
def memory(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("memory")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The cells of each line, the header's first."""
    out = tmp_path_factory.mktemp("step") / "step.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "training_step.py"), "--config", "tiny", "--dtype", "float32"]
    command += ["--tokens", *map(str, TOKENS), "--response", "64", "--width", "16", "--repeats", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    lines = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_length_stands_there_with_recomputing_and_without(table: list[list[str]]) -> None:
    header, *rows = table
    assert [row[:2] for row in rows] == [
        [str(tokens), recomputing] for tokens in TOKENS for recomputing in ("no", "yes")
    ]
    assert {len(row) for row in rows} == {len(header)}


def test_what_the_forward_pass_keeps_is_what_the_formula_says(table: list[list[str]]) -> None:
    for row in table[1:]:
        assert float(row[table[0].index("ratio")]) == pytest.approx(1, abs=0.05), row


def test_recomputing_keeps_less(table: list[list[str]]) -> None:
    kept = {(row[0], row[1]): float(row[table[0].index("kept, GB")]) for row in table[1:]}
    for tokens in map(str, TOKENS):
        assert kept[tokens, "yes"] < kept[tokens, "no"]


def test_what_was_counted_is_not_held(memory: ModuleType) -> None:
    weight = torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with memory.saved_bytes({weight.data_ptr()}) as found:
            result = weight.exp()  # keeps its own result
        assert list(found.values()) == [12]
        left = weakref.ref(result)
        del result
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has times and peaks")
def test_without_cuda_nothing_is_timed(table: list[list[str]]) -> None:
    header, *rows = table
    for row in rows:
        assert [row[header.index(column)] for column in ("in all, GB", "seconds")] == ["", ""]
