"""Rows of people's own files: what is read, what is skipped and counted, what is refused with file, line and field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from sdtp.errors import UserError
from sdtp.pipeline.config import Source
from sdtp.pipeline.records import Records, read_records

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: dict[str, Any] | str, encoding: str = "utf-8") -> Path:
        path = tmp_path / "rows.jsonl"
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text(text + "\n", encoding=encoding)
        return path

    return lines


def read(path: Path, kind: str = "jsonl") -> Records:
    source = Source.from_mapping({"kind": kind, "ref": str(path), "revision": None, "sha256": None})
    return read_records(source, "data.train.source")


def dolly(context: str = "some context", **fields: Any) -> dict[str, Any]:
    return {"instruction": "What?", "context": context, "response": "This.", **fields}


def test_dolly_rows_put_the_question_after_its_context(write: Write) -> None:
    record = read(write(dolly(category="closed_qa"))).records[0]
    assert (record.prompt, record.response) == ("some context\n\nWhat?", "This.")


@pytest.mark.parametrize("context", ["", "   "])
def test_blank_context_leaves_the_question_alone(write: Write, context: str) -> None:
    found = read(write(dolly(context), dolly("normal")))
    assert [record.prompt for record in found.records] == ["What?", "normal\n\nWhat?"]
    assert (found.total, found.skipped) == (2, {})


@pytest.mark.parametrize("field", ["instruction", "context", "response"])
def test_null_and_missing_fields_are_refused_with_file_line_and_field(write: Write, field: str) -> None:
    null = dolly() | {field: None}
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: field '{field}' is None"):
        read(write(dolly(), dolly("other"), null))
    missing = {key: value for key, value in dolly().items() if key != field}
    wanted = "prompt" if field == "instruction" else field  # without an instruction, a row is a pair
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 1: field '{wanted}' is missing"):
        read(write(missing))


@pytest.mark.parametrize("value", [1, 2.5, ["a"], {"a": 1}, True])
def test_other_types_than_text_are_refused(write: Write, value: object) -> None:
    with pytest.raises(UserError, match=r"line 1: field 'response' is .*text is needed"):
        read(write({"prompt": "p", "response": value}))


def test_rows_without_prompt_or_response_are_skipped_and_counted(write: Write) -> None:
    found = read(
        write(
            {"prompt": "p", "response": "r"},
            {"prompt": " ", "response": "r"},
            {"prompt": "p", "response": "\n"},
            {"prompt": "p", "response": ""},
            dolly(context="c", instruction=""),
            {"prompt": "p ", "response": "r"},
            {"prompt": "p", "response": "another"},
        )
    )
    assert [(record.prompt, record.response) for record in found.records] == [("p", "r"), ("p", "another")]
    assert found.skipped == {"empty_prompt": 2, "empty_response": 2, "duplicate": 1}
    assert found.total == 7


def test_blank_lines_are_not_rows_but_count_as_lines(write: Write) -> None:
    path = write(dolly("a"), "", dolly("b"), "  ", dolly("c"))
    found = read(path)
    assert found.total == 3
    assert [record.where for record in found.records] == [f"rows.jsonl, line {line}" for line in (1, 3, 5)]


@pytest.mark.parametrize("line", ["[]", '"text"', "3", '{"prompt": "p", "respo'])
def test_line_that_is_no_object_is_refused_with_its_number(write: Write, line: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 4: .*object is needed"):
        read(write(dolly("a"), "", dolly("b"), line))


def test_byte_order_mark_is_not_part_of_the_first_key(write: Write) -> None:
    found = read(write({"context": "c", "instruction": "What?", "response": "r"}, encoding="utf-8-sig"))
    assert found.records[0].prompt == "c\n\nWhat?"


def test_id_used_twice_is_refused_with_both_places(write: Write) -> None:
    with pytest.raises(UserError, match=r"line 3: id '7' is used at rows\.jsonl, line 1"):
        read(write(dolly("a", id=7), dolly("b", id="8"), dolly("c", id="7")))
    with pytest.raises(UserError, match="field 'id' is None"):
        read(write(dolly(id=None)))


def test_id_made_from_the_position_does_not_hide_a_clash(write: Write) -> None:
    with pytest.raises(UserError, match=r"line 2: id '000002' is used"):
        read(write(dolly("a", id="000002"), dolly("b")))


def test_checksum_is_the_files(write: Write) -> None:
    path = write(dolly())
    assert read(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["parquet", "jsonl", "save_to_disk"])
def test_folder_forms_give_the_same_rows(tmp_path: Path, form: str) -> None:
    rows = [{"prompt": f"p{number}", "response": f"r{number}"} for number in range(5)]
    folder = tmp_path / "folder"
    dataset = datasets.Dataset.from_list(rows)
    if form == "save_to_disk":
        dataset.save_to_disk(str(folder))
    else:
        folder.mkdir()
        for name, part in (("b", range(3, 5)), ("a", range(3))):
            chosen = dataset.select(part)
            if form == "parquet":
                chosen.to_parquet(str(folder / f"{name}.parquet"))
            else:
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    found = read(folder, "local")
    assert [record.prompt for record in found.records] == ["p0", "p1", "p2", "p3", "p4"]
    assert len({record.id for record in found.records}) == 5
    before = found.sha256
    (folder / "more.jsonl").write_text('{"prompt": "x", "response": "y"}\n')
    assert read(folder, "local").sha256 != before


def test_null_in_a_parquet_row_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": None}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "part.parquet"))
    with pytest.raises(UserError, match=r"part\.parquet, row 2: field 'response' is None"):
        read(tmp_path, "local")


def test_missing_sources_are_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.source\.ref: no file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"data\.train\.source\.ref: no folder"):
        read(tmp_path / "absent", "local")
    with pytest.raises(UserError, match=r"holds no state\.json"):
        read(tmp_path, "local")
