"""What files that must be whole or absent are written with, and where interrupted work keeps what it resumes from."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What stops a writer, whatever it writes.
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Of a fingerprint in hexadecimal, how much is in a folder's name: the files in it hold the whole one.
_NAMED = 16


def temporary_sibling(path: Path) -> Path:
    """A new name in the folder of `path`, with its suffix, since writers choose a format by it."""
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")


def remove_temporaries(path: Path) -> None:
    """Delete what writers of `path` left when they were killed; of what else is in its folder, nothing.

    For the only writer there is: another one's temporary name would go as well.
    """
    _remove(path.parent.glob(f".tmp-????????-{glob.escape(path.name)}"))


def remove_temporaries_in(folder: Path) -> None:
    """Delete what writers of anything directly in `folder` left, for the only writer in it."""
    _remove(folder.glob(".tmp-????????-*"))


def _remove(found: Iterable[Path]) -> None:
    for temporary in found:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def state_folder(folder: Path, fingerprint: str) -> Path:
    """Where work with this fingerprint, in hexadecimal, keeps what it resumes from; `folder` is common to all such."""
    return folder / fingerprint[:_NAMED]


def other_states(own: Path) -> list[Path]:
    """What work with other fingerprints has beside the `state_folder` of one's own."""
    named = re.compile(f"[0-9a-f]{{{_NAMED}}}")
    return [path for path in sorted(own.parent.glob("*")) if path != own and named.fullmatch(path.name)]


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns a full disk and its like into an OSError that names `path`, which the libraries that write leave out.

    Raises:
        OSError: with `errno` and `filename`.
    """
    try:
        yield
    except Exception as error:
        number = _fault(error)
        # What copies files names the one it reads, which is at fault where reading failed alone.
        if number is None or (number == errno.EIO and getattr(error, "filename", None) is not None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _fault(error: Exception) -> int | None:
    """The number of the fault that stopped a writer; libraries in other languages have it in their text alone."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\b(?:os error|errno) (\d+)", str(error), re.IGNORECASE)):
        number = int(found[1])
    return number if number in _FAULTS else None
