"""A copy of the project in a folder of its own, and Snakemake called in it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from snakemake.utils import update_config

from tests.workflow import forked

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "Makefile", "README.md", "pyproject.toml", "config", "envs", "profiles", "workflow", "src")
TINY = ROOT / "tests" / "workflow" / "tiny.yaml"


def copy_project(folder: Path) -> Path:
    """Copies what an empty clone has into `folder`, which is made."""
    folder.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        else:
            shutil.copy2(ROOT / part, folder / part)
    return folder


def snakemake(
    folder: Path, *arguments: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Snakemake in `folder` on that folder's own code; output and errors are in `stdout`, together."""
    process = subprocess.run(
        [forked.python(), "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    if check:
        assert process.returncode == 0, process.stdout
    return process


def job_counts(output: str) -> dict[str, int]:
    """Jobs of each rule, from the table that a dry run prints; target rules left out."""
    table = re.search(r"^job +count\n-+ +-+\n(.*?)^total", output, flags=re.MULTILINE | re.DOTALL)
    if table is None:
        assert "Nothing to be done" in output, output
        return {}
    counts = {name: int(count) for name, count in (line.split() for line in table[1].splitlines())}
    targets = ("all", "default", "ablation", "sweep", "suites", "harness", "tradeoff", "serving")
    return {name: count for name, count in counts.items() if name not in targets}


def planned(folder: Path, *arguments: str, **environment: str) -> set[str]:
    """The jobs a dry run would run, each named as its log file is: `train`, `evaluate/sdtp-0.8`."""
    output = snakemake(folder, "--dry-run", *arguments, **environment).stdout
    jobs = re.findall(r"^Shell command: .*?sdtp --log logs/[^/]+/(\S+)\.log ", output, flags=re.MULTILINE)
    assert len(jobs) == sum(job_counts(output).values()), output
    return set(jobs)


def changed_tiny(*changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny configuration with changes."""
    config: dict[str, Any] = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    for change in changes:
        update_config(config, change)
    return config


def overlay(path: Path, *changes: dict[str, Any]) -> str:
    """The tiny configuration with changes, as a file; its name."""
    path.write_text(yaml.safe_dump(changed_tiny(*changes), sort_keys=False), encoding="utf-8")
    return str(path)


def load_script(name: str) -> ModuleType:
    """A module of workflow/scripts, which is no package: some of them run in environments without this project."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "workflow" / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(lock: str) -> dict[str, str]:
    """Package -> version of a lock in envs/."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", (ROOT / "envs" / lock).read_text("utf-8"), re.MULTILINE))
