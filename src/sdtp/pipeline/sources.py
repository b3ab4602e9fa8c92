"""The user's own files among the configured sources: workflow inputs, so that a changed file reruns its readers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtp.errors import UserError


def own_files(source: Mapping[str, Any], key: str) -> list[str]:
    """Files that a `source` block of the config reads on this machine: a `jsonl` file, or all in a `local` folder.

    A folder's as `visible_files` lists them; none for `hub` and `package`.

    Raises:
        UserError: there is no such file or folder, or a path has braces or angle brackets, between which Snakemake sees
            names of its own; named with `key`, the dotted key of `ref`.
    """
    files: list[Path] = []
    if source["kind"] == "jsonl":
        files = [jsonl_file(source["ref"], key)]
    elif source["kind"] == "local":
        path = Path(source["ref"])
        if not path.is_dir():
            raise UserError(f"{key}: no folder {source['ref']!r}; kind local reads a folder")
        files = visible_files(path)
    for file in files:
        if re.search("[{}<>]", str(file)):
            raise UserError(f"{key}: {str(file)!r} cannot be an input of the workflow; a path without {{}}<> is needed")
    return [str(file) for file in files]


def visible_files(folder: Path) -> list[Path]:
    """All files in a folder and the folders inside, sorted; hidden ones, and those of hidden folders, are left out."""
    inside = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def jsonl_file(ref: str, key: str) -> Path:
    """The file that a `jsonl` source names under the dotted key `key`. Raises UserError where there is none."""
    path = Path(ref)
    if not path.is_file():
        raise UserError(f"{key}: no file {ref!r}; a JSON-lines file is needed")
    return path
