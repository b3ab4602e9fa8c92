"""Reading files that may be damaged or not what they are taken for: whatever a library says of one, it is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtp.errors import UserError

# Longest reason in a message, whose middle is then left out: some libraries quote half a file.
_LONGEST = 600


@contextmanager
def reading(what: str | Path, needed: str) -> Iterator[None]:
    """Turns any error of the block into a UserError that names what was read, why that failed, and what is `needed`.

    Around calls of libraries alone, which raise what they please over a damaged file: bare Exceptions, KeyErrors,
    RecursionErrors. Of one's own code it would hide the faults. A missing package and a want of memory are no fault of
    the file, and go on as they are.
    """
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{what}: {reason(error)}; {needed}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory: of the CPU's, torch and safetensors say so in the text of other errors alone."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(
        words in text
        for words in ("OutOfMemoryError", "t allocate memory", "Cannot allocate memory", "t start new thread")
    )


def reason(error: BaseException) -> str:
    """What an error says, in one line of bounded length; its type where that says more."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class Described(dict[str, Any]):
    """A JSON object that knows where it was read: a key it should have and has not is a UserError that says so."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.where}: no key {key!r}; it was written by something else or changed: make it again")


def read_json(path: str | Path) -> Described:
    """The object of a JSON file that a step wrote; a missing key is told when it is asked for.

    Raises:
        UserError: no such file, or one that is not a JSON object.
    """
    needed = "a JSON object is needed, as the step that makes this file writes it"
    with reading(path, needed):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{path}: it holds a {type(values).__name__}; {needed}")
    return Described(values, str(path))


def inside(folder: Path, name: Any, named_by: str | Path) -> Path:
    """The file `name` of a folder, where another file says that name.

    Raises:
        UserError: it is no plain name of a file in the folder, so that it could be anywhere.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{named_by}: it names the file {name!r}; the plain name of a file in {folder} is needed")
    return folder / name
