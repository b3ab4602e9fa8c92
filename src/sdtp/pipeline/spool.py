"""Runs that wait on disk for a store that cannot be reached: each a folder, which one process at a time may touch.

A folder holds `run.json` (how to open the run), `operations.jsonl` (what is told of it, a line each, in order) and
`files/` (copies of the files that go with them, since a step may delete its own).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.operations import WITH_FILES, Operation

_RUN, _OPERATIONS, _FILES, _LOCK = "run.json", "operations.jsonl", "files", "lock"
_SPOOL = "mlflow-spool"
# Of folders that are uploaded, until they are deleted.
_DONE = ".done-"


def spool_folder(results_dir: Path) -> Path:
    """Where the runs of a results folder wait: beside it, where the SQLite store is by default."""
    return results_dir.parent.resolve() / _SPOOL


class DamagedError(Exception):
    """A run waits and does not say how to open it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} is damaged ({reason}), and the run is left where it is: restore the file, or delete its folder"
        )


class Entry:
    """One waiting run, held by this process; made by `written` or `waiting`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def opening(self) -> dict[str, Any]:
        """How to open the run: what `Store.create_run` takes, and `uri`, `experiment`, `parent`.

        Raises DamagedError where run.json does not say it, FileNotFoundError where it is not there.
        """
        path = self.folder / _RUN
        try:
            opening = json.loads(path.read_text("utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            raise DamagedError(path, str(error)) from error
        if not isinstance(opening, dict):
            raise DamagedError(path, "no JSON object")
        return opening

    def append(self, operation: Operation) -> None:
        """Writes down one operation; its files are copied."""
        if operation["kind"] in WITH_FILES:
            source = Path(operation["path"])
            files = self.folder / _FILES
            files.mkdir(exist_ok=True)
            copy = files / str(len(os.listdir(files))) / source.name
            copy.parent.mkdir()
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns(_SPOOL))  # never itself
            else:
                shutil.copyfile(source, copy)
            operation = {**operation, "path": copy.relative_to(self.folder).as_posix()}
        with open(self.folder / _OPERATIONS, "a", encoding="utf-8") as file:
            file.write(json.dumps(operation) + "\n")

    def operations(self) -> Iterator[Operation]:
        """What was written down, in order."""
        path = self.folder / _OPERATIONS
        if not path.exists():
            return
        with open(path, encoding="utf-8") as file:
            for line in file:
                operation = json.loads(line)
                if operation["kind"] in WITH_FILES:
                    operation["path"] = str(self.folder / operation["path"])
                yield operation

    def mend(self) -> None:
        """Cuts off a last line that a kill left unfinished."""
        path = self.folder / _OPERATIONS
        if path.exists():
            data = path.read_bytes()
            os.truncate(path, data.rfind(b"\n") + 1)

    def discard(self) -> None:
        """Deletes it; cut short, the rest is no longer an entry, and `waiting` deletes it."""
        done = self.folder.with_name(_DONE + self.folder.name)
        os.rename(self.folder, done)
        shutil.rmtree(done, ignore_errors=True)


@contextmanager
def written(spool: Path, opening: Mapping[str, Any]) -> Iterator[Entry]:
    """A new entry for a run, held while the block runs. Raises OSError where it cannot be written."""
    folder = spool / opening["id"]
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        with write_atomically(folder / _RUN) as temporary:
            temporary.write_text(json.dumps(dict(opening), ensure_ascii=False, indent=2) + "\n", "utf-8")
        yield Entry(folder)


def number_waiting(spool: Path) -> int:
    """How many runs wait, those whose steps still work among them. Touches nothing."""
    return len(_entries(spool))


def waiting(spool: Path) -> list[Path]:
    """Folders of the runs that wait, in the order they began, so that a run comes after its parent."""
    return list(openings(spool))


def openings(spool: Path) -> dict[Path, dict[str, Any]]:
    """How to open each of the runs that wait, by their folders, in the order of `waiting`; `damaged` ones left out."""
    for done in spool.glob(f"{_DONE}*"):
        shutil.rmtree(done, ignore_errors=True)
    found = {folder: opening for folder, opening in _read(spool) if not isinstance(opening, DamagedError)}
    return dict(sorted(found.items(), key=lambda one: (one[1]["started"], one[0])))


def damaged(spool: Path) -> list[DamagedError]:
    """What is to be said of the runs that wait and cannot be opened."""
    return [error for _, error in _read(spool) if isinstance(error, DamagedError)]


def _read(spool: Path) -> Iterator[tuple[Path, dict[str, Any] | DamagedError]]:
    for entry in _entries(spool):
        try:
            yield entry.folder, entry.opening
        except DamagedError as error:
            yield entry.folder, error
        except FileNotFoundError:  # another process has uploaded it meanwhile
            continue


def _entries(spool: Path) -> list[Entry]:
    """The runs of a spool in no order, none that is uploaded already."""
    return [Entry(path.parent) for path in spool.glob(f"*/{_RUN}") if not path.parent.name.startswith(_DONE)]


@contextmanager
def claimed(folder: Path) -> Iterator[Entry | None]:
    """An entry, held while the block runs; None where another process holds it, or has uploaded it."""
    with ExitStack() as stack:
        entry = None
        with suppress(BlockingIOError, FileNotFoundError):
            stack.enter_context(_held(folder))
            if (folder / _RUN).exists():
                entry = Entry(folder)
                entry.mend()
        yield entry


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds the lock of an entry, which goes with the process. Raises BlockingIOError where another one has it."""
    with open(folder / _LOCK, "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
