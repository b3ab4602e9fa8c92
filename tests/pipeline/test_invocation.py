"""SIGTERM to Snakemake alone: which of its jobs' processes are told as well."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

PATIENCE = 20.0

# In place of Snakemake: a handler of its own, then jobs, each by a shell. It waits for all of them, as Snakemake does.
SNAKEMAKE = """
import signal, subprocess, sys
from sdtp.pipeline import invocation
signal.signal(signal.SIGTERM, lambda number, frame: None)
invocation.begin()
jobs = [subprocess.Popen(["bash", "-c", job], stdin=subprocess.DEVNULL) for job in sys.argv[1:]]
sys.exit(max(job.wait() for job in jobs))
"""
# Waits for a signal, and ends by itself where a test that failed has left it.
WAITING = """
import signal, sys
signal.alarm(60)
open(sys.argv[1], "w").close()
signal.pause()
"""


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("workflow/scripts/kvpress_evaluate.py", True),
        ("venv/bin/sdtp", True),
        ("elsewhere/scripts/other.py", False),
    ],
)
def test_jobs_are_told_and_other_programs_are_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    python_process: Callable[..., subprocess.Popen[str]],
    program: str,
    told: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / program
    script.parent.mkdir(parents=True)
    script.write_text(WAITING)
    # As the rules of kvpress call theirs, whose shell does not become the program.
    snakemake = python_process(SNAKEMAKE, f"(true; exec python {program} started) 2>&1 | tee log")
    while not (tmp_path / "started").exists():
        assert snakemake.poll() is None, snakemake.communicate()
    [job] = [one for one in psutil.Process(snakemake.pid).children(recursive=True) if program in one.cmdline()]
    snakemake.send_signal(signal.SIGTERM)
    gone, alive = psutil.wait_procs([job], timeout=PATIENCE if told else 1.0)
    for one in alive:
        one.kill()
    assert (gone == [job], alive == [job]) == (told, not told)
    assert snakemake.wait(PATIENCE) == 0
