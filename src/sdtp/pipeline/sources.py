"""The user's own files among the configured sources: workflow inputs, so that a changed file reruns its readers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtp.errors import UserError


def own_files(source: Mapping[str, Any], key: str) -> list[str]:
    """Files that a `source` block of the config reads on this machine: a `jsonl` file, or all in a `local` folder.

    Sorted, hidden files left out; none for `hub` and `package`.

    Raises:
        UserError: there is no such file or folder; named with `key`, the block's dotted key.
    """
    if source["kind"] == "jsonl":
        return [str(jsonl_file(source["ref"], key))]
    if source["kind"] == "local":
        path = Path(source["ref"])
        if not path.is_dir():
            raise UserError(f"{key}.ref: no folder {source['ref']!r}; kind local reads a folder")
        inside = (file for file in path.rglob("*") if file.is_file())
        return sorted(str(file) for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts))
    return []


def jsonl_file(ref: str, key: str) -> Path:
    """The file that a `jsonl` source under the config key `key` names. Raises UserError where there is none."""
    path = Path(ref)
    if not path.is_file():
        raise UserError(f"{key}.ref: no file {ref!r}; a JSON-lines file is needed")
    return path
