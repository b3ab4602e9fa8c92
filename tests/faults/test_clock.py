"""A clock that goes back: what is wrong is said, nothing is lost, and the run goes on once files have right times."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.conftest import Table
from tests.faults.made import REPORT, make_default
from tests.faults.processes import Started, snakemake
from tests.faults.run import Run

pytestmark = pytest.mark.slow

DAY = 86_400


def test_files_of_tomorrow(undisturbed: Run, tmp_path: Path, table: Table) -> None:
    """What was made before the clock went back is newer than all that is made after it, and Snakemake says so."""
    folder = make_default(undisturbed, tmp_path / "sdtp")
    (folder / REPORT).unlink()
    for path in (folder / "results").rglob("*"):
        made = path.stat().st_mtime
        os.utime(path, (made + DAY, made + DAY))
    first = Started(folder, *snakemake())
    assert first.wait() == 1
    assert f"Output {REPORT} has older modification time" in first.said()
    assert "clock skew" in first.said()
    others = [job for name, job in undisturbed.jobs.items() if name != "report"]
    assert not any(undisturbed.differences(folder, job) + undisturbed.missing(folder, job) for job in others)

    # One time for all of them: of two touched in turn, the earlier would be older, whatever it is made from.
    touch = "find results -newermt now -exec touch -d @$(date +%s) {} +"
    subprocess.run(touch, shell=True, cwd=folder, check=True)
    second = Started(folder, *snakemake())
    assert second.wait() == 0, second.said()
    report = undisturbed.jobs["report"]
    assert undisturbed.missing(folder, report) + undisturbed.differences(folder, report) == []
    table.add(
        "Disk, rights, memory", "the clock went back a day", 1,
        f"Snakemake names the file and the clock, exit code 1; after `{touch}`: same",
    )  # fmt: skip
