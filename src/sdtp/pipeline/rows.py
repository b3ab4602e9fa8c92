"""Rows of a JSON-lines file, a local folder or a hub data set, as they stand there; each knows where it came from."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.files import sha256_file, sha256_files
from sdtp.pipeline.hub import asking_hub, dataset_commit
from sdtp.pipeline.reading import inside, read_json, reading
from sdtp.pipeline.sources import jsonl_file, visible_files

if TYPE_CHECKING:
    import datasets
    import pyarrow

# Fields of one row: databricks-dolly-15k's, or the plain pair. All are needed, `context` may be blank.
INSTRUCTION_FIELDS = ("instruction", "context", "response")
PAIR_FIELDS = ("prompt", "response")
# What is read of a table; its other columns may hold anything.
_COLUMNS = ("id", "instruction", "context", "prompt", "response")
_BATCH = 1000
# Bytes of one row, which is in memory as a whole: more than the text of any model's context, by far.
MOST_ROW_BYTES = 2**26


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        where: file and line, or table and row, both counted from 1.
        fields: its values; none where they are not UTF-8.
        not_utf8: which byte is not UTF-8, None where all are.
        marked, crlf: whether its line begins with a byte order mark, and ends with CRLF.
    """

    where: str
    fields: Mapping[str, Any]
    not_utf8: str | None = None
    marked: bool = False
    crlf: bool = False


@dataclass(frozen=True)
class Rows:
    """The rows of a source in its order, read as they are asked for, and what identifies its content."""

    rows: Iterable[Row]
    revision: str | None
    sha256: str | None


def read_rows(source: Source, key: str) -> Rows:
    """The rows of a `jsonl`, `local` or `hub` source.

    Lines of JSON end with LF or CRLF; blank ones are no rows; a byte order mark at the beginning of one is skipped.

    Args:
        source: where the rows are.
        key: the config key of `source`, for messages.

    Raises:
        UserError: no such file, folder or data set; while iterating, for what is not in the source's format at all: a
            line that is not a JSON object (or only the beginning of one), a broken table.
    """
    if source.kind == "jsonl":
        path = jsonl_file(source.ref, f"{key}.ref")
        return Rows(_json_rows(path, path.name), None, sha256_file(path))
    if source.kind == "local":
        return _folder_rows(source, key)
    if source.kind == "hub":
        return _hub_rows(source, key)
    raise UserError(f"{key}.kind: {source.kind!r} holds no records; accepted: hub, local, jsonl")


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES + 1), b""), 1):
            where = f"{name}, line {number}"
            if len(line) > MOST_ROW_BYTES:
                raise UserError(f"{where}: longer than {MOST_ROW_BYTES} bytes; a JSON object on a line is needed")
            # No JSON text begins with the mark: it is that of the file, or of one that was appended to it.
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            if not content:
                continue
            not_utf8 = None
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                offset = line.index(content) + error.start
                not_utf8 = f"byte {offset + 1} of the line, {content[error.start]:#04x}, is not UTF-8"
                text = content.decode("utf-8", errors="replace")
            try:
                fields = json.loads(text)
            except RecursionError as error:
                raise UserError(f"{where}: nested too deeply; a JSON object is needed") from error
            except ValueError as error:
                # Not a record with a wrong byte but no record: of another file, or of one that was cut.
                raise UserError(f"{where}: {not_utf8 or error}; a JSON object is needed") from error
            if not isinstance(fields, dict):
                raise UserError(f"{where}: {text[:80]} is not a JSON object; a JSON object is needed")
            marked, crlf = line.startswith(codecs.BOM_UTF8), line.endswith(b"\r\n")
            yield Row(where, {} if not_utf8 else fields, not_utf8, marked, crlf)


def _folder_rows(source: Source, key: str) -> Rows:
    folder = Path(source.ref)
    if not folder.is_dir():
        raise UserError(
            f"{key}.ref: no folder {source.ref!r}; a folder of save_to_disk, .parquet or .jsonl files is needed"
        )
    # What the rule watches, and no more: a hidden table would otherwise be read unseen.
    files = visible_files(folder)
    digest = sha256_files(folder, files)
    if (folder / "state.json").exists():
        return Rows(_dataset_rows(folder.name, read_saved(folder)), None, digest)
    tables = [path for path in files if path.suffix in (".parquet", ".jsonl")]
    if not tables:
        raise UserError(f"{key}.ref: {source.ref} holds no state.json (save_to_disk), .parquet or .jsonl file")
    return Rows((row for path in tables for row in _file_rows(path, str(path.relative_to(folder)))), None, digest)


def read_saved(folder: Path) -> datasets.Dataset:
    """The data set that `save_to_disk` wrote to a folder; its tables are mapped, not read.

    Raises:
        UserError: a file is damaged or missing, or one outside the folder is named.
    """
    import datasets

    state = folder / "state.json"
    for file in read_json(state)["_data_files"]:
        inside(folder, file.get("filename") if isinstance(file, dict) else file, state)
    with reading(folder, "a data set of save_to_disk is needed"):
        return datasets.load_from_disk(str(folder))


def _file_rows(path: Path, name: str) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        yield from _json_rows(path, name)
        return
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _refuse_bombs(path, file.metadata)
        yield from _table_rows(name, file.iter_batches(_BATCH, columns=_columns(file.schema_arrow.names)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: {error}; a Parquet file is needed") from error


def _refuse_bombs(path: Path, metadata: pyarrow.parquet.FileMetaData) -> None:
    """Raise UserError where the rows of a table are larger, unpacked, than any row may be."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > MOST_ROW_BYTES * max(1, group.num_rows):
            raise UserError(
                f"{path}: row group {number + 1} unpacks to {group.total_byte_size} bytes for {group.num_rows} rows; "
                f"at most {MOST_ROW_BYTES} bytes a row are accepted"
            )


def _hub_rows(source: Source, key: str) -> Rows:
    import datasets

    with asking_hub(source, key):
        revision = dataset_commit(source)
        try:
            builder = datasets.load_dataset_builder(source.ref, revision=revision)
            if builder.hash != revision:  # out of the hub's reach the library takes what its cache has, of any commit
                raise ConnectionError(f"the cache has it at {builder.hash} alone")
            builder.download_and_prepare()
            dataset = builder.as_dataset(split="train")
        except datasets.exceptions.DatasetNotFoundError as error:
            raise UserError(f"{key}: no {source.ref!r} at revision {source.revision!r} on the hub") from error
        except datasets.exceptions.DatasetGenerationError as error:
            raise UserError(f"{key}: {source.ref} at revision {revision} cannot be read: {error.__cause__}") from error
        except ValueError as error:  # what the library says of several configurations, or of no such split, lists those
            raise UserError(
                f"{key}.ref: {source.ref} at revision {revision}: {' '.join(str(error).split())} Here a data set needs "
                "a split 'train' and no more than one configuration; rows of another can be saved to a folder (kind "
                "local)"
            ) from error
    return Rows(_dataset_rows(source.ref, dataset), revision, None)


def _dataset_rows(name: str, dataset: datasets.Dataset) -> Iterator[Row]:
    tables = dataset.select_columns(_columns(dataset.column_names)).with_format("arrow")
    return _table_rows(name, tables.iter(_BATCH))


def _columns(names: Sequence[str]) -> list[str]:
    """The columns to read: those that records are made of; all where there is none, so that a row shows what it has."""
    return [name for name in names if name in _COLUMNS] or list(names)


def _table_rows(name: str, batches: Iterable[pyarrow.Table | pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in zip(*map(_values, batch.columns), strict=True):
            number += 1
            fields = dict(zip(batch.schema.names, values, strict=True))
            wrong = [(field, value) for field, value in fields.items() if isinstance(value, UnicodeDecodeError)]
            not_utf8 = f"byte {wrong[0][1].start + 1} of field {wrong[0][0]!r} is not UTF-8" if wrong else None
            yield Row(f"{name}, row {number}", {} if wrong else fields, not_utf8)


def _values(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    """The column's values; for a text that is not UTF-8 (Arrow checks none it reads) the error that says where."""
    import pyarrow

    if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
        return column.to_pylist()
    large = pyarrow.types.is_large_string(column.type)
    return [_decoded(value) for value in column.cast(pyarrow.large_binary() if large else pyarrow.binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
