"""One run of the whole workflow on the tiny configuration, shared by the tests that look at it or change it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.workflow import tiny_model
from tests.workflow.project import TINY, copy_project, snakemake


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which the tiny run is finished. Not to be changed: see `project`."""
    folder = copy_project(tmp_path_factory.mktemp("finished") / "sdtp")
    tiny_model.make(folder / "tiny-model")
    shutil.copy(TINY, folder / "tiny.yaml")
    process = snakemake(folder, "--configfile", "tiny.yaml")
    (folder / "snakemake.txt").write_text(process.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def project(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, times of files included, that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "sdtp", symlinks=True)
