"""The tiny run that the tests here make in several ways: how Snakemake is called, and what is the same in all."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Every step of it, with one keep ratio, and less training.
SHORTER = "pruning: {keep_ratios: [0.8]}\ntraining: {label_epochs: 2}\n"
CONFIGURED = ["--configfile", "tiny.yaml", "shorter.yaml"]
# Of a site: which partition a job goes to, by what it asks for.
PARTITIONS = "partitions:\n  cpu: {max_runtime: 1440, max_gpu: 0}\n  gpu: {max_runtime: 2880, max_gpu: 2}\n"
# What says how long something took, or when, or on what.
TIMED = re.compile(
    r"(benchmark|resources|metrics|figures|checkpoints)/|latency\.csv|registered\.json|report\.html|mlflow|mlartifacts|\.lock"
)


def call(project: Path, *arguments: str, environment: Mapping[str, str] = os.environ, fails: bool = False) -> str:
    """What Snakemake says, called as a user calls it; three starts of it for each job of Slurm's take their time."""
    path = os.pathsep.join([str(project / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def hashes(results: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(results.rglob("*"))
        if path.is_file() and not TIMED.search(name := str(path.relative_to(results)))
    }
