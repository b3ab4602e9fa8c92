"""(prompt, response) records from a JSON-lines file, a local folder or the hub, each row checked where it enters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.pipeline.config import Source
from sdtp.pipeline.files import numbered_jsonl, sha256_file, sha256_files
from sdtp.pipeline.sources import jsonl_file

# Fields of one row: databricks-dolly-15k's, or the plain pair. All are needed, `context` may be blank.
INSTRUCTION_FIELDS = ("instruction", "context", "response")
PAIR_FIELDS = ("prompt", "response")


@dataclass(frozen=True)
class Record:
    """One usable row; `where` names its file and line, for messages and for the dataset's `source` column."""

    id: str
    prompt: str
    response: str
    where: str


@dataclass(frozen=True)
class Records:
    """All usable rows of a source in its order, with what was left out and what identifies the source's content."""

    records: tuple[Record, ...]
    total: int
    skipped: dict[str, int]
    revision: str | None
    sha256: str | None


def read_records(source: Source, key: str) -> Records:
    """Reads and checks every row of a `jsonl`, `local` or `hub` source.

    Rows have the fields instruction, context, response (the prompt is then the context, a blank line and the
    instruction; a blank context is left out), or prompt, response; and optionally an `id`, unique in the source.
    Skipped and counted: `empty_prompt`, `empty_response`, and `duplicate` (same prompt and response as an earlier row,
    which would otherwise stand in two splits).

    Args:
        source: where the rows are.
        key: the config key of `source`, for messages.

    Raises:
        UserError: no such file or folder, a missing, null or non-text field, an id used twice; each with file and line.
    """
    if source.kind == "jsonl":
        path = jsonl_file(source.ref, key)
        return check_rows(
            ((f"{path.name}, line {n}", row) for n, row in numbered_jsonl(path)), sha256=sha256_file(path)
        )
    if source.kind == "local":
        return _read_folder(source, key)
    if source.kind == "hub":
        return _read_hub(source, key)
    raise UserError(f"{key}.kind: {source.kind!r} holds no records; accepted: hub, local, jsonl")


def _read_folder(source: Source, key: str) -> Records:
    import datasets

    folder = Path(source.ref)
    if not folder.is_dir():
        raise UserError(
            f"{key}.ref: no folder {source.ref!r}; a folder of save_to_disk, .parquet or .jsonl files is needed"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = sha256_files(folder, files)
    if (folder / "state.json").exists():
        rows = _numbered(folder.name, datasets.load_from_disk(str(folder)))
        return check_rows(rows, sha256=digest)
    tables = [path for path in files if path.suffix in (".parquet", ".jsonl")]
    if not tables:
        raise UserError(f"{key}.ref: {source.ref} holds no state.json (save_to_disk), .parquet or .jsonl file")
    return check_rows((pair for path in tables for pair in _read_table(path)), sha256=digest)


def _read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".jsonl":
        return ((f"{path.name}, line {number}", row) for number, row in numbered_jsonl(path))
    import pyarrow.parquet

    return _numbered(path.name, pyarrow.parquet.read_table(path).to_pylist())


def _read_hub(source: Source, key: str) -> Records:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    revision = source.revision
    try:
        if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
            # A branch moves; the manifest names the commit that was read.
            revision = HfApi().dataset_info(source.ref, revision=revision).sha
        dataset = datasets.load_dataset(source.ref, revision=revision, split="train")
    except (RepositoryNotFoundError, RevisionNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(f"{key}: no {source.ref!r} at revision {source.revision!r} on the hub") from error
    return check_rows(_numbered(source.ref, dataset), revision=revision)


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def check_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], *, revision: str | None = None, sha256: str | None = None
) -> Records:
    """Records of (where, row) pairs; see `read_records` for the rules."""
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    where_of_id: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    total = 0
    for total, (where, row) in enumerate(rows, 1):
        identifier = _identifier(row, total, where)
        if identifier in where_of_id:
            raise UserError(
                f"{where}: id {identifier!r} is used at {where_of_id[identifier]} already; ids must be unique"
            )
        where_of_id[identifier] = where
        if "instruction" in row:
            instruction, context, response = (
                _text(row, field, INSTRUCTION_FIELDS, where) for field in INSTRUCTION_FIELDS
            )
            # The question stands last, as in the retrieval task: a causal model reads the context without knowing it.
            prompt = f"{context}\n\n{instruction}" if context and instruction else instruction
        else:
            prompt, response = (_text(row, field, PAIR_FIELDS, where) for field in PAIR_FIELDS)
        if not prompt:
            skipped["empty_prompt"] += 1
        elif not response:
            skipped["empty_response"] += 1
        elif (prompt, response) in seen:
            skipped["duplicate"] += 1
        else:
            seen.add((prompt, response))
            records.append(Record(identifier, prompt, response, where))
    return Records(tuple(records), total, dict(skipped), revision, sha256)


def _identifier(row: Mapping[str, Any], number: int, where: str) -> str:
    if "id" not in row:
        return f"{number:06d}"
    value = row["id"]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{where}: field 'id' is {value!r}; a text or a whole number is needed")
    return str(value)


def _text(row: Mapping[str, Any], field: str, fields: tuple[str, ...], where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: field {field!r} is missing; a row needs {', '.join(fields)}")
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {value!r}; text is needed (it may be blank)")
    return value.strip()
