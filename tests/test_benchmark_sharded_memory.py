"""benchmarks/sharded_memory.py: what each process of a sharded training holds, with the formula beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.training.test_several_processes import launch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "sharded_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_sharded_step_holds_what_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system at once
    done = launch(SCRIPT, "--layers", "6", "--hidden", "512", "--tokens", "512")
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[header.index("recomputing")] for row in rows] == ["no", "yes"]
    for row in rows:
        weights, step = (float(row[place]) for place, name in enumerate(header) if name == "ratio")
        assert weights == pytest.approx(1, abs=0.05), row
        assert step == pytest.approx(1, abs=0.1), row


@pytest.mark.slow
def test_one_process_has_nothing_to_share() -> None:
    done = launch(SCRIPT, processes=1)
    assert done.returncode != 0
    assert "one process has nothing to share" in done.stderr
