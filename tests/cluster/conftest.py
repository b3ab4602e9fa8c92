"""What the tests here share: a Slurm cluster, where this machine can have one, and a run made without it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm_cluster
from tests.cluster.tiny_run import CONFIGURED, PARTITIONS, SHORTER, call
from tests.workflow import tiny_model
from tests.workflow.project import TINY, copy_project


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Folder of a running cluster of two nodes; see `slurm_cluster`."""
    if (reason := slurm_cluster.missing()) is not None:
        pytest.skip(f"no Slurm here: {reason}")
    # Not under pytest's folder, which is closed to others: munge refuses a socket that they cannot reach.
    with tempfile.TemporaryDirectory(prefix="sdtp-slurm-") as name:
        folder = Path(name)
        slurm_cluster.up(folder)
        try:
            yield folder
        finally:
            slurm_cluster.down(folder)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which the tiny run was made on this machine."""
    folder = copy_project(tmp_path_factory.mktemp("local") / "sdtp")
    tiny_model.make(folder / "tiny-model")
    shutil.copy(TINY, folder / "tiny.yaml")
    (folder / "shorter.yaml").write_text(SHORTER, encoding="utf-8")
    (folder / "partitions.yaml").write_text(PARTITIONS, encoding="utf-8")
    shutil.copytree(folder, folder.with_name("untouched"))
    call(folder, "--cores", "2", *CONFIGURED)
    return folder
