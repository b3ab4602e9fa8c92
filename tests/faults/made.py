"""The finished run as the default run of a project: `snakemake` and `make run` alone mean it."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from snakemake.utils import update_config

from sdtp.pipeline.locks import is_free, lock_file
from tests.faults.processes import Started
from tests.faults.run import Run
from tests.workflow.golden import read
from tests.workflow.project import ROOT

FIGURE = Path("results", "tiny", "figures", "quality.svg")
REPORT = Path("results", "tiny", "report.html")


def make_default(undisturbed: Run, folder: Path) -> Path:
    """A copy of the run in `folder`, in which nothing is due."""
    shutil.copytree(undisturbed.folder, folder, symlinks=True)
    config = read("config.yaml")
    update_config(config, yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8")))
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def lose_figure(folder: Path) -> None:
    """Deletes a figure: the step that draws them, and then the report, are due."""
    (folder / FIGURE).unlink(missing_ok=True)


def drawing(started: Started, folder: Path) -> None:
    """Returns once the step that draws the figures has begun, and holds the lock on them."""
    started.until(lambda: is_free(lock_file(folder / FIGURE.parent)) is False)
