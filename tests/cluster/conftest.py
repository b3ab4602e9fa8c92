"""One Slurm cluster on this machine for all tests here; they are skipped, and say why, where there can be none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm_cluster


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
