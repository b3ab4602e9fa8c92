"""Runs the tuning step in processes that kill themselves: `python -m tests.pipeline.killed_tuning PLAN`.

PLAN is a JSON file: a list of [phase, count, measured, arguments of `sdtp`]. Each entry runs in a process of its own,
one after the other, and kills itself with SIGKILL when it gets to the phase for the count-th time; "" lets it end:

    compute   an example is about to be run under a schedule
    write     half of a measurement's line is in the file
    finish    the pruner is whole under its temporary name

`measured` gets a line for every run of an example under a schedule. Prints each process's exit status.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from sdtp import cli
from sdtp.evaluation import damage
from sdtp.pipeline import predictions
from sdtp.pipeline.steps import tune  # noqa: F401
from tests.pipeline.killed import run_each


def run(phase: str, count: int, measured: str, arguments: list[str]) -> None:
    """What a process does."""
    left = count

    def reached(name: str) -> bool:
        nonlocal left
        left -= name == phase
        return name == phase and left == 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    rename, forced_logits, add = os.rename, damage.forced_logits, predictions.Predictions.add

    def killed_forward(*given: Any) -> Any:
        if len(given) == 4:  # with a pruner
            if reached("compute"):
                kill()
            with open(measured, "a", encoding="utf-8") as file:
                file.write("1\n")
        return forced_logits(*given)

    def killed_add(self: Any, key: str, answer: Any) -> None:
        add(self, key, answer)
        if reached("write"):
            path = self._path
            os.truncate(path, path.stat().st_size - len(path.read_bytes().splitlines()[-1]) // 2)
            kill()

    def killed_rename(source: Any, target: Any) -> None:
        if Path(target).name == "0.8" and reached("finish"):
            kill()
        rename(source, target)

    os.rename, damage.forced_logits, predictions.Predictions.add = killed_rename, killed_forward, killed_add
    sys.exit(cli.main(["--quiet", *arguments]))


if __name__ == "__main__":
    run_each(run, Path(sys.argv[1]))
