"""Train steps that end themselves with SIGKILL, one in each phase: `killed_training.py ARGUMENT...`.

In the arguments of the step, `RUN` stands for the phase's own folder, `phase-0` and so on below the working folder. The
phase is written to `phase.log` there just before the end. `test_killed_training.py` starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow.tracking  # noqa: F401  # once, and not in every child

from sdtp.pipeline import files, tracked_run
from sdtp.pipeline.mlflow_store import Store
from sdtp.pipeline.steps import train
from sdtp.pipeline.tracked_run import TrackedRun
from sdtp.training import checkpoints, gradients, label_fit, trainer

# Of each phase: whose attribute is called in it, the call that is the last, and what has happened by then.
PHASES: dict[str, tuple[Any, str, int, str]] = {
    "compute: a label epoch": (label_fit, "_loss", 3, "before"),
    "compute: a forward": (gradients, "example_losses", 6, "before"),  # in the third step, of two examples each
    "compute: an update": (trainer, "batch_gradient", 3, "after"),
    # Both label epochs have a checkpoint, and so has step 0.
    "write: half the tensors of a label epoch": (checkpoints, "save_file", 2, "half"),
    "write: half the tensors": (checkpoints, "save_file", 4, "half"),
    "write: before the disk has it": (checkpoints, "sync", 10, "before"),  # three calls a checkpoint
    "rename: a label epoch": (checkpoints.os, "rename", 2, "after"),
    "rename: before": (checkpoints.os, "rename", 4, "before"),
    "rename: after": (checkpoints.os, "rename", 4, "after"),
    "tracking: metrics": (Store, "log_batch", 6, "before"),  # the first has the settings
    "tracking: before a pruner": (TrackedRun, "artifact", 2, "before"),
    "tracking: after a pruner": (TrackedRun, "artifact", 2, "after"),
    "tracking: removing old ones": (TrackedRun, "latest_artifacts", 2, "before"),
    "output: the pruner": (files.os, "rename", 8, "before"),  # after those of seven checkpoints
    "output: the curves": (train.csv, "writer", 1, "before"),
}


def arm(phase: str, log: Path) -> None:
    """Replace what the phase calls by itself and, at the given call, the end."""
    owner, name, last, when = PHASES[phase]
    true: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def end() -> None:
        with log.open("w") as file:
            file.write(phase)
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)

    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and when == "before":
            end()
        result = true(*args, **kwargs)
        if calls == last and when == "half":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
            end()
        if calls == last and when == "after":
            end()
        return result

    setattr(owner, name, armed)


def main(arguments: Sequence[str]) -> None:
    """One process a phase, one after another, each forked from this one, which has imported everything."""
    tracked_run.SECONDS_BETWEEN_BATCHES = 0.0
    for number, phase in enumerate(PHASES):
        folder = Path(f"phase-{number}").resolve()
        folder.mkdir()
        child = os.fork()
        if child == 0:
            arm(phase, folder / "phase.log")
            train.main([argument.replace("RUN", str(folder)) for argument in arguments])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != signal.SIGKILL:
            sys.exit(f"phase {phase!r} was not reached: status {status}")


if __name__ == "__main__":
    main(sys.argv[1:])
