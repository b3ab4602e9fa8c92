"""A copy of the project in a folder of its own, and Snakemake called in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "Makefile", "README.md", "pyproject.toml", "config", "envs", "profiles", "workflow", "src")


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
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
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
    targets = ("all", "default", "ablation", "sweep", "suites", "harness", "tradeoff")
    return {name: count for name, count in counts.items() if name not in targets}


def planned(folder: Path, *arguments: str, **environment: str) -> set[str]:
    """The jobs a dry run would run, each named as its log file is: `train`, `evaluate/sdtp-0.8`."""
    output = snakemake(folder, "--dry-run", *arguments, **environment).stdout
    jobs = re.findall(r"^Shell command: .*?sdtp --log logs/[^/]+/(\S+)\.log ", output, flags=re.MULTILINE)
    assert len(jobs) == sum(job_counts(output).values()), output
    return set(jobs)
