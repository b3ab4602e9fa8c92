"""`kill -9` of one of two jobs that leased a GPU each: its GPU is free, the other job goes on, a rerun is the same."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Table
from tests.faults.processes import Started
from tests.faults.run import Run, remove

pytestmark = pytest.mark.slow

SEED = 5
NVIDIA_SMI = "#!/bin/sh\nprintf '0, GPU-00000000-aaaa\\n1, GPU-11111111-bbbb\\n'\n"
# Becomes `sdtp` with the devices it got told: a lease is its command from then on.
SHOWING = 'echo "devices $CUDA_VISIBLE_DEVICES"; exec "$@"'


def test_one_of_two_leased_jobs_is_killed(undisturbed: Run, tmp_path: Path, table: Table) -> None:
    folder = undisturbed.copy(tmp_path / "sdtp")
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(NVIDIA_SMI)
    script.chmod(0o755)
    jobs = [undisturbed.jobs[f"saliency/{shard}"] for shard in (0, 1)]
    for job in jobs:
        for output in job.outputs:
            remove(folder / output)

    def lease(*command: str) -> Started:
        python = [sys.executable, "-m", "sdtp.cli"]
        started = Started(
            folder, *python, "lease", "--gpus", "1", "--", "sh", "-c", SHOWING, "sh", *command,
            PATH=f"{script.parent}:/usr/bin:/bin", SDTP_LEASE_DIR=str(tmp_path / "leases"), CUDA_VISIBLE_DEVICES="0,1",
        )  # fmt: skip
        started.until(lambda: "devices GPU" in started.said())
        return started

    def devices(started: Started) -> str:
        return next(line for line in started.said().splitlines() if line.startswith("devices "))

    program = [sys.executable, "-m", "sdtp.cli"]
    first, second = (lease(*program, *job.arguments) for job in jobs)
    try:
        assert devices(first) != devices(second)
        first.runs_for(random.Random(SEED).uniform(0, 2))
        first.process.kill()
        assert first.wait() == -signal.SIGKILL
        assert undisturbed.differences(folder, jobs[0]) == []
        again = lease(*program, *jobs[0].arguments)  # at once: the device is free
        assert devices(again) == devices(first)
        for started, job in ((second, jobs[1]), (again, jobs[0])):
            assert started.wait() == 0, started.said()
            assert undisturbed.missing(folder, job) + undisturbed.differences(folder, job) == []
        again.stop()
    finally:
        first.stop()
        second.stop()
    table.add(
        "kill -9 of Snakemake and of leased jobs", "one of two leased jobs", 1,
        "its GPU is free at once; the other job: same; rerun: same",
    )  # fmt: skip
