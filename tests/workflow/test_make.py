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


def make_run(folder: Path) -> subprocess.CompletedProcess[str]:
    # -o: the environment is the tests' own, whatever the age of its stamp.
    return subprocess.run(
        ["make", "-o", ".venv/.installed", "run"],
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
    process = make_run(made)
    assert time.monotonic() - started < 20
    assert process.returncode == 0, process.stdout
    assert "Checking the 16 steps of run tiny: model, check, data, test_data, benchmark_text, saliency," in (
        process.stdout
    )
    assert "Nothing to be done" in process.stdout


def test_second_run_at_the_same_time_is_refused(made: Path) -> None:
    with (made / ".snakemake" / "make.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = make_run(made)
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

    process = make_run(made)
    assert process.returncode == 0, process.stdout
    assert figure.exists()
