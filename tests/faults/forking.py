"""`sdtp ARGUMENT...` in processes of their own that are forked from one which has imported everything.

Importing takes seconds, and there are some hundred processes here. `python -m tests.faults.forking` is the one that
forks; it gets a JSON object a line, starts a child for it, waits until that ends, and answers with a JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests import preloaded

ROOT = Path(__file__).parents[2]
# Where, in a working folder, a test installs packages.
SITE = "site"
# What no tracked run, no other test's tracker and no number of threads may come in by.
UNSET = ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE", "SDTP_RUN", "SLURM_JOB_ID", "RANK")


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: the exit code, or minus the number of the signal that ended it.
        seconds: from its start to its end.
        stdout, stderr: what it wrote.
    """

    status: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong.

        Raises:
            AssertionError: there is not exactly one, or a traceback.
        """
        lines = [line for line in self.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        assert self.stderr.rstrip().splitlines()[-1] == lines[0], self.stderr  # nothing after it: no second line
        assert "Traceback" not in self.stderr, self.stderr
        return lines[0]


class Forking:
    """The process that forks, and what it is asked for."""

    def __init__(self, scratch: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=scratch,
        )

    def __call__(
        self,
        folder: Path,
        arguments: list[str],
        *,
        program: str = "sdtp",
        environment: dict[str, str] | None = None,
        kill: tuple[float, int] | None = None,
        limits: dict[str, int] | None = None,
        user: int | None = None,
        group: str | None = None,
        more_memory: int | None = None,
        timeout: float = 120,
    ) -> Ended:
        """Runs a program and waits until it ends.

        Args:
            folder: the working folder.
            arguments: the program's.
            program: `sdtp` or `snakemake`.
            environment: variables beside this process's own.
            kill: seconds after which the child gets a signal, and which.
            limits: of the child, by the name they have in `resource`: {"RLIMIT_AS": bytes}.
            user: the user's number that the child takes.
            group: folder of the control group that the child joins.
            more_memory: bytes of address space that it may have beside those it starts with.
            timeout: seconds after which it is killed, and the test with it.
        """
        out, err = self._scratch / "stdout.txt", self._scratch / "stderr.txt"
        request = {
            "program": program,
            "folder": str(folder),
            "path": [str(folder / SITE)],
            "arguments": arguments,
            "environment": environment or {},
            "kill": kill,
            "limits": limits or {},
            "more_memory": more_memory,
            "group": group,
            "user": user,
            "out": str(out),
            "err": str(err),
            "timeout": timeout,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        stderr = err.read_text("utf-8", "replace")
        assert not answer["timed_out"], stderr
        return Ended(answer["status"], answer["seconds"], out.read_text("utf-8", "replace"), stderr)

    def close(self) -> None:
        """Ends the process that forks."""
        self._process.communicate()


def _child(request: dict[str, Any]) -> NoReturn:
    """What a child does."""
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setpgid(0, 0)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["more_memory"] is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + request["more_memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if request["group"] is not None:
        Path(request["group"], "cgroup.procs").write_text(str(os.getpid()))
    if request["user"] is not None:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    sys.path[:0] = request["path"]
    preloaded.run(request["program"], request["arguments"])


def _wait(child: int, request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    descriptor = os.pidfd_open(child)
    timed_out = False
    if request["kill"] is not None:
        after, number = request["kill"]
        if not select.select([descriptor], [], [], after)[0]:
            os.kill(child, number)
    if not select.select([descriptor], [], [], request["timeout"])[0]:
        timed_out = True
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    os.close(descriptor)
    seconds = time.monotonic() - started
    return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "timed_out": timed_out}


def main() -> None:
    """Serves requests until standard input ends."""
    preloaded.load()
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(request)
        sys.stdout.write(json.dumps(_wait(child, request)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
