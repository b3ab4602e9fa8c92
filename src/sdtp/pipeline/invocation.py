"""One invocation of Snakemake: how others in its folder see it, and how it ends when it is told to."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Held, shared, by every Snakemake that runs in the folder: whoever gets it alone knows that locks in
# .snakemake/locks belong to nobody any more. Snakemake's own say neither whose they are nor whether that one lives.
RUNNING = Path(".snakemake", "running.lock")

_held: list[Any] = []
_told: list[int] = []


def begin() -> None:
    """Call it once the jobs are about to start: takes the lock, until this process ends, and minds signals.

    On Ctrl-C a terminal tells the jobs as well. SIGTERM reaches this process alone, and Snakemake would wait for its
    jobs, hours perhaps, while whoever sent it waits for seconds: it is passed on to the steps.
    """
    RUNNING.parent.mkdir(exist_ok=True)
    file = RUNNING.open("a")
    fcntl.flock(file, fcntl.LOCK_SH)
    _held.append(file)
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        if callable(before):
            signal.signal(number, _minding(before))


def status_of_failure() -> str:
    """How a run that did not end well is tracked: KILLED where a signal ended it, FAILED otherwise."""
    return "KILLED" if _told else "FAILED"


def _minding(before: Callable[[int, Any], Any]) -> Callable[[int, Any], None]:
    def handle(number: int, frame: Any) -> None:
        _told.append(number)
        if number == signal.SIGTERM:
            _end_steps()
        before(number, frame)

    return handle


def _end_steps() -> None:
    import psutil  # comes with Snakemake

    for process in psutil.Process().children(recursive=True):
        try:
            if any(_is_step(Path(word)) for word in process.cmdline()[:3]):
                process.terminate()
        except psutil.Error:  # ended meanwhile
            continue


def _is_step(program: Path) -> bool:
    """Whether it is `sdtp`, or a script that runs in an environment of its own, where there is none."""
    return program.name == "sdtp" or program.parts[-3:-1] == ("workflow", "scripts")
