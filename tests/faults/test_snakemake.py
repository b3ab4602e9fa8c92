"""Snakemake killed, interrupted, told to end, and started twice: what it leaves, what it says, what a rerun gives."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Table
from tests.faults.made import FIGURE, drawing, lose_figure, make_default
from tests.faults.processes import Started, snakemake
from tests.faults.run import Run
from tests.workflow.project import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv").exists() or shutil.which("make") is None, reason="needs make and .venv"),
]

SEED = 7
# -o: the environment is the tests' own, whatever the age of its stamp.
MAKE_RUN = ("make", "-o", ".venv/.installed", "run")

Start = Callable[..., Started]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program in a folder; whatever is left of it ends with the test."""
    programs: list[Started] = []

    def started(folder: Path, *command: str) -> Started:
        programs.append(Started(folder, *command))
        return programs[-1]

    yield started
    for program in programs:
        program.stop()


@pytest.fixture(scope="module")
def project(undisturbed: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One project for the tests of this module, each of which leaves it finished."""
    return make_default(undisturbed, tmp_path_factory.mktemp("project") / "sdtp")


def assert_same(undisturbed: Run, folder: Path) -> None:
    """What the steps that were due make is what it was."""
    for name in ("figures", "report"):
        assert undisturbed.missing(folder, undisturbed.jobs[name]) == []
        assert undisturbed.differences(folder, undisturbed.jobs[name]) == []
    assert not list((folder / "results").rglob(".tmp-*"))


def tracked(folder: Path) -> dict[str, tuple[str, str]]:
    """Name and state of each tracked run, by its id."""
    path = folder / "results" / "mlflow.db"
    if not path.exists():
        return {}
    with sqlite3.connect(path) as database:
        return {
            run: (name, status) for run, name, status in database.execute("SELECT run_uuid, name, status FROM runs")
        }


def test_snakemake_killed(project: Path, undisturbed: Run, start: Start, table: Table) -> None:
    lose_figure(project)
    first = start(project, *snakemake())
    drawing(first, project)
    first.runs_for(random.Random(SEED).uniform(0, 3))
    first.process.kill()
    assert first.wait() == -signal.SIGKILL
    left = first.alive()
    assert left  # the step lives on
    for process in left:
        os.kill(process, signal.SIGSTOP)  # for as long as it takes to look at what the others do

    plain = start(project, *snakemake())
    assert plain.wait() == 1
    assert "--unlock" in plain.said()

    made = start(project, *MAKE_RUN)
    made.until(lambda: "waiting for a step of a killed run: results/tiny/.figures.lock, process " in made.said())
    first.to_all(signal.SIGCONT)
    assert made.wait() == 0, made.said()
    assert not first.alive()
    assert_same(undisturbed, project)
    assert {status for _, status in tracked(project).values()} == {"KILLED", "FINISHED"}
    table.add(
        "kill -9 of Snakemake and of leased jobs", "Snakemake, while a step runs", 1,
        "`snakemake` says to type `--unlock`; `make run` waits for the step that lives on, clears the lock: same",
    )  # fmt: skip


def test_the_same_run_twice_at_once(project: Path, undisturbed: Run, start: Start, table: Table) -> None:
    lose_figure(project)
    first = start(project, *snakemake())
    drawing(first, project)
    for command in (snakemake(), MAKE_RUN):
        second = start(project, *command)
        assert second.wait() != 0
        assert "Directory cannot be locked" in second.said()
        assert "Execute 1 jobs" not in second.said()
    assert first.wait() == 0, first.said()
    assert_same(undisturbed, project)
    table.add(
        "Two at once",
        "the same run, by `snakemake` and by `make run`",
        2,
        "the second says so and stops; the first: same",
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_snakemake_is_told_to_end(name: str, project: Path, undisturbed: Run, start: Start, table: Table) -> None:
    lose_figure(project)
    before = tracked(project)
    told = start(project, *snakemake())
    drawing(told, project)
    told.until(lambda: ("figures", "RUNNING") in [run for key, run in tracked(project).items() if key not in before])
    if name == "SIGINT":  # as a terminal does on Ctrl-C
        told.to_all(signal.SIGINT)
    else:  # as a scheduler of containers does
        told.process.terminate()
    assert told.wait() == 1
    assert told.alive() == []
    runs = [run for key, run in tracked(project).items() if key not in before]
    assert sorted(runs) == [("figures", "KILLED"), ("pipeline tiny", "KILLED")]
    assert not (project / FIGURE).exists()

    again = start(project, *snakemake())  # with no hand to unlock
    assert again.wait() == 0, again.said()
    assert_same(undisturbed, project)
    table.add(
        "Signals",
        f"{name} to Snakemake, while a step runs",
        1,
        "exit code 1, no process left, runs KILLED; rerun: same",
    )


def test_two_runs_at_once(project: Path, undisturbed: Run, start: Start, table: Table) -> None:
    for run in ("one", "two"):
        shutil.rmtree(project / "results" / run, ignore_errors=True)
    targets = {run: [f"results/{run}/{part}" for part in ("checked.json", "data")] for run in ("one", "two")}
    both = {run: start(project, *snakemake(*targets[run], "--config", f"run={run}")) for run in targets}
    for started in both.values():
        assert started.wait() == 0, started.said()
    for run in targets:
        (project / "results" / run).rename(project / "renamed")
        shutil.rmtree(project / "as-tiny", ignore_errors=True)
        (project / "as-tiny" / "results").mkdir(parents=True)
        (project / "renamed").rename(project / "as-tiny" / "results" / "tiny")
        for name in ("model", "check", "data"):
            job = undisturbed.jobs[name]
            assert undisturbed.missing(project / "as-tiny", job) == []
            assert undisturbed.differences(project / "as-tiny", job) == []
    table.add("Two at once", "two `run` names in one checkout", 2, "both end well, each the same")
