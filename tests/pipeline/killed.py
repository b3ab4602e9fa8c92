"""What the modules that run a step in processes that kill themselves share: a plan of runs, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.workflow.project import ROOT


def run_each(run: Callable[..., None], plan: Path) -> None:
    """Call `run`, which ends its process, with every entry of a plan in turn, and print how each process ended."""
    for entry in json.loads(plan.read_text(encoding="utf-8")):
        # All were imported once: what a process starts with, and so what it computes, is the same for each.
        child = os.fork()
        if child == 0:
            run(*entry)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()  # or the next process would have it too


def carry_out(module: str, plan: list[Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Write the plan into the folder and have the module carry it out, on the CPU with one thread."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return subprocess.run(
        [sys.executable, "-m", module, str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
