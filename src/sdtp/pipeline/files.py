"""Files that are either whole or absent, and the two JSON shapes the steps exchange."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtp.disk import naming, sync, temporary_sibling
from sdtp.errors import UserError
from sdtp.pipeline.reading import Described


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a temporary file name beside `path`; what is written there becomes `path` when the block ends well.

    The temporary name keeps the suffix, since writers choose a format by it. The folder is made where missing. File and
    folder reach the disk before and after the rename, so that a crash leaves the old file or the new one. When the
    block raises, the temporary file is removed and `path` stays as it was. A block that writes nothing raises
    FileNotFoundError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives a new empty folder beside `path`; it becomes `path`, replacing what was there, when the block ends well.

    A rename cannot replace a folder that holds files: the old one is first moved aside, then deleted. A crash between
    the two renames leaves no `path` at all (never a mixture). When the block raises, the new folder is removed and
    `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = temporary_sibling(path), temporary_sibling(path)
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise
    sync(path.parent)
    if replaced.is_dir():
        shutil.rmtree(replaced)
    else:
        replaced.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: str | Path, paths: Iterable[str | Path]) -> str:
    """One SHA-256 for several files under `folder`: over the lines "<sha256>  <path within folder>", sorted by path.

    `cd FOLDER && sha256sum FILE... | sha256sum`, with the files in the order of LC_ALL=C, prints the same.
    """
    names = sorted(Path(path).relative_to(folder).as_posix() for path in paths)
    lines = "".join(f"{sha256_file(Path(folder, name))}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: keys sorted, no spaces. Raises ValueError for NaN and infinities, which JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file in UTF-8; blank lines and a byte order mark are skipped.

    A key that a row has not is a UserError as well, when it is asked for.

    Raises UserError, naming the file and the line, counted from 1 with blank ones, for a line that is not a JSON object
    or not UTF-8.
    """
    rows: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # utf-8-sig strips the mark; past line 1 the same bytes are a character of the text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except RecursionError as error:
                raise UserError(f"{path}, line {number}: nested too deeply; a JSON object is needed") from error
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
                raise UserError(f"{path}, line {number}: {error}; a JSON object is needed") from error
            if not text:
                continue
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: {text[:80]} is not a JSON object; a JSON object is needed")
            rows.append(Described(row, f"{path}, line {number}"))
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically, keys in the order given. Raises ValueError for NaN and infinities."""
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
