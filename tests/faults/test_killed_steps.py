"""`kill -9` of each step at random moments: nothing half-made is taken for whole, and a rerun gives the same."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Table
from tests.faults.forking import Forking
from tests.faults.run import Run, remove

pytestmark = pytest.mark.slow

SEED = 20261125
KILLS = 3
# A moment may come after the step's end.
TRIES = 6
# One job of each step of the default run.
JOBS = (
    "model", "check", "data", "test-data", "benchmark-text", "saliency/0", "saliency-index", "train", "generate/0.8",
    "benchmark/0.5", "reference", "evaluate/sdtp-0.8", "tables", "figures", "report", "register",
)  # fmt: skip


def test_every_step_of_the_run_is_killed(undisturbed: Run) -> None:
    assert {undisturbed.jobs[name].step for name in JOBS} == {job.step for job in undisturbed.jobs.values()}


@pytest.mark.parametrize("name", JOBS)
def test_a_step_killed_at_random_moments_ends_as_if_it_had_not_been(
    name: str, undisturbed: Run, forking: Forking, tmp_path: Path, table: Table
) -> None:
    folder, job = undisturbed.copy(tmp_path), undisturbed.jobs[name]
    moments = random.Random(f"{SEED}/{name}")
    killed, tried, longest = 0, 0, job.seconds
    remove(folder / "results" / "tiny" / "checkpoints")
    while killed < KILLS and tried < TRIES:
        # What Snakemake does to the outputs of a job that did not end well; every other time nobody comes to do it.
        if tried % 2 == 1:
            for output in job.outputs:
                remove(folder / output)
        ended = forking(folder, job.arguments, kill=(moments.uniform(0, longest), signal.SIGKILL))
        assert ended.status in (0, -signal.SIGKILL), ended.stderr
        killed += ended.status == -signal.SIGKILL
        tried += 1
        if ended.status == 0:  # the machine has less to do than it had
            longest = min(longest, ended.seconds)
        assert undisturbed.differences(folder, job) == []
    ended = forking(folder, job.arguments)
    assert ended.status == 0, ended.stderr
    assert undisturbed.missing(folder, job) == []
    assert undisturbed.differences(folder, job) == []
    assert not list((folder / "results").rglob(".tmp-*"))
    assert killed
    table.add(
        "kill -9 of a step", name, f"{killed} kills of {tried} runs", "same; no partial file, nothing left behind"
    )
