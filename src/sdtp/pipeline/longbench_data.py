"""LongBench's examples, from the official data set on the hub or a local folder of its JSON-lines files, checked."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.evaluation.longbench.references import Reference, paragraph_number
from sdtp.evaluation.longbench.tasks import Metric, Task, task
from sdtp.pipeline.block import Source
from sdtp.pipeline.files import sha256_file, sha256_files
from sdtp.pipeline.hub import asking_hub, dataset_commit
from sdtp.pipeline.reading import reading
from sdtp.pipeline.rows import Row, read_rows

# The hub repository holds a loading script, which `datasets` no longer runs, and this archive of <FOLDER>/<task>.jsonl.
ARCHIVE = "data.zip"
_ARCHIVE_FOLDER = "data"
# Of one of its files, unpacked; the official ones have less than a tenth.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Example:
    """One example, as it stands in its file.

    Attributes:
        id: unique in its task.
        task: its name.
        context: what the question is about, never blank.
        input: the question, or the text to be continued; blank in tasks that have none.
        reference: what predictions are held against.
        where: file and line.
    """

    id: str
    task: str
    context: str
    input: str
    reference: Reference
    where: str


@dataclass(frozen=True)
class LongBench:
    """Examples in the order of their files, task by task, and what identifies their content.

    Attributes:
        examples: of the tasks asked for.
        revision: the hub's commit; None for a local folder.
        sha256: of the hub's archive, or over the files of a local folder that were read, as `sha256_files` does.
    """

    examples: tuple[Example, ...]
    revision: str | None
    sha256: str


def read_longbench(source: Source, key: str, tasks: Sequence[str]) -> LongBench:
    """Reads and checks all examples of some tasks.

    A row needs the official fields `_id`, `input`, `context`, `answers`, and `all_classes` in tasks that classify. A
    blank line is no row; a byte order mark is skipped.

    Args:
        source: `hub`, a data set repository with the official archive at a revision; or `local`, a folder of
            `<task>.jsonl` files. A `sha256` is compared with what was read.
        key: the config key of `source`, for messages.
        tasks: names; one that is named twice is read once.

    Raises:
        UserError: no such source, or not what its sha256 says; a row that is not as above, named with file, line, field
            and value.
        ValueError: an unknown task.
    """
    wanted = [task(name) for name in tasks]
    if source.kind == "local":
        data = _folder(Path(source.ref), key, wanted)
    elif source.kind == "hub":
        data = _hub(source, key, wanted)
    else:
        raise UserError(f"{key}.kind: {source.kind!r} holds no LongBench; accepted: hub, local")
    if source.sha256 not in (None, data.sha256):
        raise UserError(f"{key}.sha256: expected {source.sha256}, found {data.sha256} for {source.ref}")
    return data


def _folder(folder: Path, key: str, tasks: Sequence[Task]) -> LongBench:
    if not folder.is_dir():
        raise UserError(f"{key}.ref: no folder {str(folder)!r}; a folder of LongBench's <task>.jsonl files is needed")
    paths = {task: folder / f"{task.name}.jsonl" for task in tasks}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(f"{key}.ref: {folder} has no {', '.join(missing)}; each task needs its <task>.jsonl")
    examples = tuple(example for task, path in paths.items() for example in _examples(task, path, key))
    return LongBench(examples, None, sha256_files(folder, paths.values()))


def _hub(source: Source, key: str, tasks: Sequence[Task]) -> LongBench:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with asking_hub(source, key):
        revision = dataset_commit(source)
        try:
            archive = hf_hub_download(source.ref, ARCHIVE, repo_type="dataset", revision=revision)
        except RemoteEntryNotFoundError as error:
            raise UserError(
                f"{key}.ref: no {ARCHIVE} of {source.ref} at revision {revision}: {error}; kind local reads a folder "
                "of <task>.jsonl files"
            ) from error
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack(
            Path(archive), Path(folder), tasks, f"{key}.ref: {ARCHIVE} of {source.ref} at revision {revision}"
        )
        examples = tuple(example for task, path in paths.items() for example in _examples(task, path, key))
    return LongBench(examples, revision, sha256_file(archive))


def unpack(archive: Path, folder: Path, tasks: Sequence[Task], called: str) -> dict[Task, Path]:
    """Unpacks the files of some tasks into a folder, and nothing else of the archive.

    Args:
        archive: a zip file of data/<task>.jsonl.
        folder: to unpack into.
        tasks: whose files are needed.
        called: what messages call the archive.

    Raises:
        UserError: it is no whole zip file, has no file of a task, or one of more than `MOST_BYTES`.
    """
    names = {task: f"{_ARCHIVE_FOLDER}/{task.name}.jsonl" for task in tasks}
    with reading(called, "the official archive is needed"), zipfile.ZipFile(archive) as packed:
        sizes = {member.filename: member.file_size for member in packed.infolist()}
        missing = [name for name in names.values() if name not in sizes]
        if missing:
            raise UserError(f"{called} has no {', '.join(missing)}")
        # As declared: the module reads no more than that.
        too_large = [name for name in names.values() if sizes[name] > MOST_BYTES]
        if too_large:
            raise UserError(
                f"{called}: {too_large[0]} unpacks to {sizes[too_large[0]]} bytes; at most {MOST_BYTES} are accepted"
            )
        return {task: Path(packed.extract(name, folder)) for task, name in names.items()}


def _examples(task: Task, path: Path, key: str) -> list[Example]:
    rows = read_rows(Source("jsonl", str(path), None, None), key).rows
    examples = [_example(task, row) for row in rows]
    first: dict[str, str] = {}
    for example in examples:
        if first.setdefault(example.id, example.where) != example.where:
            raise UserError(
                f"{example.where}: field '_id' is {example.id!r}, as at {first[example.id]}; ids are unique"
            )
    if not examples:
        raise UserError(f"{path.name}: no rows; at least one is needed")
    return examples


def _example(task: Task, row: Row) -> Example:
    if row.not_utf8:
        raise UserError(f"{row.where}: {row.not_utf8}; LongBench's files are UTF-8")
    if row.fields.get("dataset", task.name) != task.name:
        raise UserError(f"{row.where}: field 'dataset' is {row.fields['dataset']!r}; {task.name!r} is needed")
    identifier, context, question = _text(row, "_id"), _text(row, "context"), _text(row, "input")
    for name, text in (("_id", identifier), ("context", context)):
        if not text.strip():
            raise UserError(f"{row.where}: field {name!r} is {text!r}; it may not be blank")
    answers = _texts(row, "answers")
    if not any(answer.strip() for answer in answers):
        raise UserError(f"{row.where}: field 'answers' is {list(answers)}; at least one has to say something")
    if task.metric in (Metric.RETRIEVAL, Metric.RETRIEVAL_ZH):
        for answer in answers:
            _check_paragraph(row, answer, task.metric)
    classes = _texts(row, "all_classes") if task.metric == Metric.CLASSIFICATION else ()
    return Example(identifier, task.name, context, question, Reference(answers, classes), row.where)


def _check_paragraph(row: Row, answer: str, metric: Metric) -> None:
    try:
        paragraph_number(answer, metric)
    except ValueError as error:
        raise UserError(f"{row.where}: field 'answers': {error}") from None


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise UserError(f"{row.where}: field {name!r} is {value!r}; text is needed")
    return _encodable(row, name, value)


def _texts(row: Row, name: str) -> tuple[str, ...]:
    value = _field(row, name)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{row.where}: field {name!r} is {value!r}; a list of at least one text is needed")
    return tuple(_encodable(row, name, text) for text in value)


def _field(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise UserError(f"{row.where}: field {name!r} is missing; the row has {', '.join(row.fields) or 'none'}")
    return row.fields[name]


def _encodable(row: Row, name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write what no text can hold
        raise UserError(
            f"{row.where}: character {error.start + 1} of field {name!r} is half of a surrogate pair; text is needed"
        ) from None
    return text
