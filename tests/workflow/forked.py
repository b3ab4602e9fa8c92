"""A Python environment like this one, whose `sdtp` is forked from one process that has imported everything.

A run of the workflow is up to a hundred steps, and importing is most of what a tiny step does. Snakemake and the rules
are as they always are; `sdtp` there is `forked_client.py`, which asks the process that forks
(`python -m tests.workflow.forked SOCKET`) for a child with its own arguments, folder, environment and descriptors. Code
that differs from this tree's, and settings that are read on import, get a process of their own, as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests import preloaded

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).parent / "forked_client.py"
# Of variables that libraries read when they are imported.
READ_ON_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH", "CUDA_", "TQDM_", "MPL")
# Of the process that forks, as `sdtp` itself and what runs the steps would set them.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "TQDM_MININTERVAL": "30"}


@functools.cache
def python() -> str:
    """The interpreter of that environment, which lives until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="sdtp-"))
    atexit.register(shutil.rmtree, folder)
    own = Path(sys.executable).parent
    programs = folder / "bin"
    programs.mkdir()
    for program in own.iterdir():
        if program.name != "sdtp":
            (programs / program.name).symlink_to(program)
    for name in ("lib", "include", "pyvenv.cfg"):
        if (own.parent / name).exists():
            (folder / name).symlink_to(own.parent / name)
    settings = {
        "socket": str(folder / "socket"),
        "program": str(own / "sdtp"),
        "source": str(ROOT / "src" / "sdtp"),
        "prefixes": READ_ON_IMPORT,
        "set": list(ENVIRONMENT),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(READ_ON_IMPORT) and name not in ENVIRONMENT
        },
    }
    (folder / "forked.json").write_text(json.dumps(settings), encoding="utf-8")
    client = programs / "sdtp"
    client.write_text(f"#!{own / 'python3'} -IS\n{CLIENT.read_text(encoding='utf-8')}", encoding="utf-8")
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.workflow.forked", settings["socket"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        cwd=folder,
    )
    atexit.register(process.communicate)  # before the folder is removed
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return str(programs / "python3")


def _child(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    os.setpgid(0, 0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    preloaded.run("sdtp", request["arguments"])


class _Server:
    """Answers each client with the status its child ended with, and ends the child of a client that is gone."""

    def __init__(self, path: str) -> None:
        self._clients: dict[int, socket.socket] = {}  # by the number of the child
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        """Until standard input ends."""
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)
        # One event at a time: an answer may end what another of them is about.
        answer: Callable[[], None] | None
        while (answer := self._selector.select()[0][0].data) is not None:
            answer()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        message, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
        while not message.endswith(b"\n"):
            message += client.recv(1 << 20)
        child = os.fork()
        if child == 0:
            self._selector.close()
            for connection in (self._listener, client, *self._clients.values()):
                connection.close()
            _child(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._clients[child] = client
        self._selector.register(client, selectors.EVENT_READ, functools.partial(self._pass_on, child))
        ends = os.pidfd_open(child)
        self._selector.register(ends, selectors.EVENT_READ, functools.partial(self._ended, child, ends))

    def _pass_on(self, child: int) -> None:
        numbers = self._clients[child].recv(16)
        if not numbers:
            self._selector.unregister(self._clients[child])
        for number in numbers or [signal.SIGKILL]:
            os.kill(child, number)

    def _ended(self, child: int, ends: int) -> None:
        _, status = os.waitpid(child, 0)
        self._selector.unregister(ends)
        os.close(ends)
        client = self._clients.pop(child)
        if client.fileno() in self._selector.get_map():
            self._selector.unregister(client)
        with contextlib.suppress(OSError):  # the client is gone
            client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        client.close()


def main() -> None:
    """Serves the socket that the argument names."""
    preloaded.load()
    server = _Server(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.serve()


if __name__ == "__main__":
    main()
