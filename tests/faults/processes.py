"""Programs started for real, watched until something is seen of them, and ended together with what they started."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.faults.forking import ROOT, UNSET

PATIENCE = 240.0
# Between two looks at something that cannot be waited for.
_LOOK = 0.02


class Started:
    """A program in a session of its own, as a terminal starts one."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
        # The folder's own code where it is a project, this repository's otherwise.
        path = os.pathsep.join([str(folder / "src"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._descriptor = os.pidfd_open(self.process.pid)

    def said(self) -> str:
        """What it wrote so far."""
        return self.output.read_text("utf-8", "replace")

    def wait(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        return self.process.wait(PATIENCE)

    def until(self, seen: Callable[[], bool]) -> None:
        """Returns once `seen` is true. Raises AssertionError where the program ends before it is."""
        for _ in range(int(PATIENCE / _LOOK)):
            if seen():
                return
            if select.select([self._descriptor], [], [], _LOOK)[0]:
                break
        assert seen(), self.said()

    def runs_for(self, seconds: float) -> None:
        """Returns after that time, or when the program ends."""
        select.select([self._descriptor], [], [], seconds)

    def to_all(self, number: int) -> None:
        """Sends a signal to the program and all it started, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def alive(self) -> list[int]:
        """Processes of its session, zombies left out."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(") ")[2].split()
                    if int(fields[3]) == self.process.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Ends whatever is left of it."""
        with suppress(ProcessLookupError):
            self.to_all(signal.SIGKILL)
        self.process.wait(PATIENCE)
        os.close(self._descriptor)


def snakemake(*arguments: str) -> list[str]:
    """Its command line."""
    return [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
