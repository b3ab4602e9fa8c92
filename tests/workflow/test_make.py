"""`make run`: one at a time, tidies up after a killed run, and is quick where nothing is left to do."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from sdtp.pipeline.invocation import RUNNING
from tests.faults.processes import Started
from tests.workflow.golden import read
from tests.workflow.project import ROOT, snakemake

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv").exists() or shutil.which("make") is None, reason="needs make and .venv"),
]


@pytest.fixture
def made(project: Path) -> Path:
    """The finished tiny run as the default run of a project that has its environment."""
    config = read("config.yaml")
    update_config(config, yaml.safe_load((project / "tiny.yaml").read_text(encoding="utf-8")))
    (project / "config" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (project / ".venv").symlink_to(ROOT / ".venv")
    return project


def make(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    # -o: the environment is the tests' own, whatever the age of its stamp.
    return subprocess.run(
        ["make", "-o", ".venv/.installed", target],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def test_finished_run_has_nothing_to_do_and_names_its_steps_within_twenty_seconds(made: Path) -> None:
    started = time.monotonic()
    process = make(made, "run")
    assert time.monotonic() - started < 20
    assert process.returncode == 0, process.stdout
    assert "Checking the 16 steps of run tiny: model, check, data, test_data, benchmark_text, saliency," in (
        process.stdout
    )
    assert "Nothing to be done" in process.stdout


def test_second_run_at_the_same_time_is_refused(made: Path) -> None:
    with (made / ".snakemake" / "make.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = make(made, "run")
    assert process.returncode != 0
    assert "another make is running the workflow in this folder; wait until it ends" in process.stdout
    assert "Building DAG" not in process.stdout


def test_lock_of_a_killed_run_is_cleared_by_make_and_explained_by_snakemake(made: Path) -> None:
    figure = made / "results" / "tiny" / "figures" / "quality.svg"
    figure.unlink()
    # What Snakemake leaves behind when it is killed while it draws the figure.
    locks = made / ".snakemake" / "locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text("results/tiny/figures/quality.svg\n", encoding="utf-8")
    (locks / "0.input.lock").write_text("results/tiny/model\n", encoding="utf-8")

    plain = snakemake(made, check=False)
    assert plain.returncode != 0
    assert "--unlock" in plain.stdout

    process = make(made, "run")
    assert process.returncode == 0, process.stdout
    assert figure.exists()


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder `sdtp` that has what `make clean` needs, its results on another disk, as it were: where these are."""
    folder, linked = tmp_path / "sdtp", tmp_path / "scratch"
    (folder / ".snakemake").mkdir(parents=True)
    (linked / "default").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (linked / "README.md").touch()
    (linked / "default" / "report.html").touch()
    (folder / "results").symlink_to(linked)
    return linked


def test_clean_leaves_a_living_run_alone_and_empties_a_linked_results_folder(linked: Path) -> None:
    folder = linked.parent / "sdtp"
    with (folder / RUNNING).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as Snakemake holds it
        process = make(folder, "clean")
    assert process.returncode != 0
    assert "a Snakemake is running in this folder; wait until it ends" in process.stdout
    assert (linked / "default" / "report.html").exists()
    process = make(folder, "clean")
    assert process.returncode == 0, process.stdout
    assert [path.name for path in linked.iterdir()] == ["README.md"]
    assert (folder / "results").is_symlink()
    assert not (folder / ".snakemake").exists()


def test_clean_waits_for_a_step_that_lives_on(linked: Path) -> None:
    with (linked / "default" / ".model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clean = Started(linked.parent / "sdtp", "make", "clean")
        try:
            clean.until(lambda: "waiting for a step of a killed run: results/default/.model.lock" in clean.said())
            assert (linked / "default" / "report.html").exists()
            lock.close()
            assert clean.wait() == 0, clean.said()
        finally:
            clean.stop()
    assert [path.name for path in linked.iterdir()] == ["README.md"]
