"""One writer at a time for an output, and how others see whether it has one."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sdtp.disk import naming
from sdtp.errors import UserError

# How often a writer tries, and how long it waits in between: `is_free` holds a lock for a moment as well.
_TRIES, _SECONDS = 5, 0.1


def lock_file(output: Path) -> Path:
    """Where the lock of `output` is: beside it, since inside it would be deleted with the output before a rerun."""
    return output.parent / f".{output.name}.lock"


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Holds the lock on `output`.

    It goes with the last process that holds the file open, so one that was killed never leaves it behind, and its
    orphaned workers still count as writers.

    Raises UserError, naming the holder, where another process has it, and OSError, naming the file, for a full disk.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = lock_file(output)
    with open(path, "ab+", buffering=0) as file:  # what could not be written would be tried again on closing
        if not _locked(file):
            file.seek(0)
            holder = file.read().decode("utf-8", "replace").strip() or "another process"
            raise UserError(
                f"{output} is being written by {holder}: wait until it ends or stop it (kill PID), then run this again"
            )
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _locked(file: IO[bytes]) -> bool:
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_SECONDS)
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def is_free(lock: Path) -> bool | None:
    """Whether nobody holds the file `lock`; None where there is none. One that cannot be read counts as held."""
    try:
        with open(lock, "rb") as file:
            # Shared: two that look at once do not take each other for a writer.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError:
        return False
    return True
