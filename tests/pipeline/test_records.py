"""Rows of people's own files: what is read, what is skipped and counted, what is refused with file, line and field."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.records import Records, read_records
from tests.pipeline.hub import COMMIT, serve

Write = Callable[..., Path]

MARK = "\ufeff"
both_rules = pytest.mark.parametrize("malformed", ["skip", "fail"])


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: dict[str, Any] | str | bytes, end: str = "\n") -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join(line(row) + end.encode() for row in rows))
        return path

    return lines


def line(row: dict[str, Any] | str | bytes) -> bytes:
    if isinstance(row, bytes):
        return row
    return (row if isinstance(row, str) else json.dumps(row)).encode()


def read(path: Path, kind: str = "jsonl", malformed: str = "skip") -> Records:
    source = Source.from_mapping({"kind": kind, "ref": str(path), "revision": None, "sha256": None})
    return read_records(source, "data.train.source", malformed)


def prompts(found: Records) -> list[str]:
    return [record.prompt for record in found.records]


def pair(prompt: str = "p", response: str = "r", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **fields}


def dolly(context: str = "some context", **fields: Any) -> dict[str, Any]:
    return {"instruction": "What?", "context": context, "response": "This.", **fields}


def test_dolly_rows_put_the_question_after_its_context(write: Write) -> None:
    record = read(write(dolly(category="closed_qa"))).records[0]
    assert (record.prompt, record.response) == ("some context\n\nWhat?", "This.")


@pytest.mark.parametrize("context", ["", "   "])
def test_blank_context_leaves_the_question_alone(write: Write, context: str) -> None:
    found = read(write(dolly(context), dolly("normal")))
    assert prompts(found) == ["What?", "normal\n\nWhat?"]
    assert (found.total, found.skipped.counts, found.repaired.counts) == (2, {}, {})


@both_rules
@pytest.mark.parametrize("field", ["instruction", "context", "response"])
def test_null_and_missing_fields_are_refused_with_file_line_and_field(write: Write, field: str, malformed: str) -> None:
    null = dolly() | {field: None}
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: field '{field}' is None"):
        read(write(dolly(), dolly("other"), null), malformed=malformed)
    missing = {key: value for key, value in dolly().items() if key != field}
    wanted = "prompt" if field == "instruction" else field  # without an instruction, a row is a pair
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 1: field '{wanted}' is missing"):
        read(write(missing), malformed=malformed)


@pytest.mark.parametrize("value", [1, 2.5, ["a"], {"a": 1}, True])
def test_other_types_than_text_are_refused(write: Write, value: object) -> None:
    with pytest.raises(UserError, match=r"line 1: field 'response' is .*text is needed"):
        read(write({"prompt": "p", "response": value}))


def test_rows_without_prompt_or_response_and_repeated_ones_are_skipped_counted_and_named(write: Write) -> None:
    found = read(
        write(
            pair("p", "r"),
            pair(" ", "r"),
            pair("p", "\n"),
            pair("p", ""),
            dolly(context="c", instruction=""),
            pair("p ", "r"),
            pair("p", "another"),
        )
    )
    assert [(record.prompt, record.response) for record in found.records] == [("p", "r"), ("p", "another")]
    assert found.skipped.counts == {"empty_prompt": 2, "empty_response": 2, "duplicate": 1}
    assert found.total == 7
    assert found.skipped.first == {
        "empty_prompt": [f"rows.jsonl, line {number}: the prompt is empty" for number in (2, 5)],
        "empty_response": [f"rows.jsonl, line {number}: the response is empty" for number in (3, 4)],
        "duplicate": ["rows.jsonl, line 6: prompt and response are those of rows.jsonl, line 1"],
    }


def test_only_the_first_few_are_named(write: Write) -> None:
    found = read(write(*[pair("", "r")] * 7, pair()))
    assert found.skipped.counts == {"empty_prompt": 7}
    assert found.skipped.first["empty_prompt"] == [f"rows.jsonl, line {n}: the prompt is empty" for n in range(1, 6)]


MALFORMED = {
    "not_utf8": (b'  {"prompt": "caf\xe9", "response": "r"}', "byte 18 of the line, 0xe9, is not UTF-8"),
    "duplicate_id": (pair("other", id="a"), "id 'a' is used at rows.jsonl, line 1 already"),
    "empty_prompt": (pair(""), "the prompt is empty"),
    "empty_response": (pair(response=" "), "the response is empty"),
    "duplicate": (pair("first"), "prompt and response are those of rows.jsonl, line 1"),
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_row_is_skipped_or_fatal_as_the_rule_says(write: Write, reason: str) -> None:
    row, explanation = MALFORMED[reason]
    path = write(pair("first", id="a"), "", row, pair("last"))
    found = read(path)
    assert prompts(found) == ["first", "last"]
    assert (found.total, found.skipped.counts) == (3, {reason: 1})
    (place,) = found.skipped.first[reason]
    assert place.startswith(f"rows.jsonl, line 3: {explanation}")
    with pytest.raises(UserError) as error:
        read(path, malformed="fail")
    assert str(error.value) == f"{place}; data.malformed skip leaves such rows out"


@both_rules
def test_sound_rows_are_all_read_under_both_rules(write: Write, malformed: str) -> None:
    path = write(f"{MARK}{json.dumps(pair('a', id=1))}", "", pair("b", id="2"), end="\r\n")
    found = read(path, malformed=malformed)
    assert prompts(found) == ["a", "b"]
    assert found.skipped.counts == {}


@pytest.mark.parametrize("text", ["\\ud83d", "\\ude00 x"])
def test_half_of_a_surrogate_pair_is_no_utf8(write: Write, text: str) -> None:
    found = read(write('{"prompt": "ok", "response": "' + text + '"}', pair()))
    assert found.skipped.first == {
        "not_utf8": ["rows.jsonl, line 1: character 1 of field 'response' is half of a surrogate pair"]
    }
    found = read(write('{"id": "' + text + '", "prompt": "ok", "response": "ok"}', pair()))
    assert found.skipped.first == {
        "not_utf8": ["rows.jsonl, line 1: character 1 of field 'id' is half of a surrogate pair"]
    }
    whole = read(write(r'{"prompt": "ok", "response": "\ud83d\ude00"}'))
    assert whole.records[0].response == "\U0001f600"


def test_blank_lines_are_not_rows_but_count_as_lines(write: Write) -> None:
    path = write(dolly("a"), "", dolly("b"), "  ", dolly("c"))
    found = read(path)
    assert found.total == 3
    assert [record.where for record in found.records] == [f"rows.jsonl, line {line}" for line in (1, 3, 5)]


@both_rules
@pytest.mark.parametrize(
    "row",
    [
        "[]",
        '"text"',
        "3",
        '{"prompt": "p", "respo',
    ],
)
def test_line_that_is_no_object_is_refused_with_its_number(write: Write, row: str, malformed: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 4: .*object is needed"):
        read(write(dolly("a"), "", dolly("b"), row), malformed=malformed)


@both_rules
@pytest.mark.parametrize(
    "row",
    [
        # Cut inside a character: a wrong byte in a row that is none, not a row with a wrong byte.
        '{"prompt": "p", "response": "caf\u00e9'.encode()[:-1],
        gzip.compress(b'{"prompt": "p", "response": "r"}', mtime=0).replace(b"\n", b""),
        '{"prompt": "p", "response": "r"}'.encode("utf-16"),
    ],
    ids=["cut", "gzip", "utf-16"],
)
def test_line_that_is_neither_utf8_nor_an_object_is_refused(write: Write, row: bytes, malformed: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: byte \d+ .* is not UTF-8; a JSON object is needed"):
        read(write(dolly("a"), row), malformed=malformed)


@pytest.mark.parametrize("before", [[], [pair("first")]], ids=["first line", "later, where files were joined"])
def test_byte_order_mark_is_not_part_of_the_first_key(write: Write, before: list[dict[str, Any]]) -> None:
    row = {"context": "c", "instruction": "What?", "response": "r"}
    found = read(write(*before, f"{MARK}{json.dumps(row)}"))
    assert found.records[-1].prompt == "c\n\nWhat?"
    assert found.repaired.first == {"byte_order_mark": [f"rows.jsonl, line {len(before) + 1}"]}


def test_byte_order_mark_before_a_text_is_not_part_of_it(write: Write) -> None:
    found = read(write(pair(f"{MARK}p", f" {MARK} r"), pair(f"a{MARK}b"), pair(response=MARK)))
    assert [(record.prompt, record.response) for record in found.records] == [("p", "r"), (f"a{MARK}b", "r")]
    assert found.skipped.counts == {"empty_response": 1}


def test_crlf_is_read_as_a_line_end(write: Write) -> None:
    rows = [dolly("two\r\nlines"), dolly("one\rline")]
    found = read(write(*rows, end="\r\n"))
    assert prompts(found) == ["two\nlines\n\nWhat?", "one\rline\n\nWhat?"]
    assert found.repaired.counts == {"crlf": 2}
    assert read(write(*rows)).repaired.first == {"crlf": ["rows.jsonl, line 1"]}


def test_id_used_twice_stays_with_the_first_row(write: Write) -> None:
    found = read(write(dolly("a", id=7), dolly("b", id="8"), dolly("c", id="7"), dolly("d", id="7")))
    assert [record.id for record in found.records] == ["7", "8"]
    explanation = "id '7' is used at rows.jsonl, line 1 already; ids must be unique"
    assert found.skipped.first == {"duplicate_id": [f"rows.jsonl, line {number}: {explanation}" for number in (3, 4)]}


@both_rules
def test_other_ids_than_text_and_whole_numbers_are_refused(write: Write, malformed: str) -> None:
    with pytest.raises(UserError, match=r"line 1: field 'id' is None"):
        read(write(dolly(id=None)), malformed=malformed)


def test_id_made_from_the_position_does_not_hide_a_clash(write: Write) -> None:
    found = read(write(dolly("a", id="000002"), dolly("b")))
    assert found.skipped.first["duplicate_id"][0].startswith("rows.jsonl, line 2: id '000002' is used")


SOUND = st.tuples(st.text(st.characters(codec="utf-8"), max_size=6), st.sampled_from(["r", "s"]))
KINDS = st.one_of(SOUND, st.sampled_from(["wrong byte", "same id", "blank line"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(KINDS, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12), st.booleans())
def test_counts_add_up_and_sound_rows_keep_their_order(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[Any], crlf: list[bool], marked: bool
) -> None:
    """Against a simpler reading of the same rows: whatever stands beside it, every row is a record or counted once."""
    lines = []
    wanted: list[tuple[str, str]] = []
    expected: Counter[str] = Counter()
    for number, (kind, ending) in enumerate(zip(kinds, crlf, strict=False)):
        if kind == "blank line":
            row = b" "
        elif kind == "wrong byte":
            row, expected["not_utf8"] = b'{"prompt": "\xff", "response": "r"}', expected["not_utf8"] + 1
        elif kind == "same id":
            row = line(pair(f"number {number}", id="same"))
            if expected["same"]:
                expected["duplicate_id"] += 1
            else:
                wanted.append((f"number {number}", "r"))
            expected["same"] += 1
        else:
            prompt, response = kind
            row = line(pair(prompt, response, id=number))
            text = prompt.replace("\r\n", "\n").strip().removeprefix(MARK).strip()
            if not text:
                expected["empty_prompt"] += 1
            elif (text, response) in wanted:
                expected["duplicate"] += 1
            else:
                wanted.append((text, response))
        lines.append(row + (b"\r\n" if ending else b"\n"))
    del expected["same"]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes((MARK.encode() if marked else b"") + b"".join(lines))
    found = read(path)
    assert [(record.prompt, record.response) for record in found.records] == wanted
    assert +found.skipped.counts == +expected
    assert found.total == len(found.records) + found.skipped.counts.total()


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
    assert prompts(found) == ["p0", "p1", "p2", "p3", "p4"]
    assert len({record.id for record in found.records}) == 5
    before = found.sha256
    (folder / "more.jsonl").write_text('{"prompt": "x", "response": "y"}\n')
    assert read(folder, "local").sha256 != before


@pytest.fixture
def faulty() -> pyarrow.Table:
    """Rows as Arrow holds them, which checks no text: a wrong byte, CRLF, a mark, an empty one, a repeated id."""
    rows = [
        (1, b"a\r\nb", b"r"),
        (2, b"caf\xe9", b"r"),
        (3, b"p", b""),
        (1, b"p", b"r"),
        (5, MARK.encode() + b"p", b"r"),
    ]
    ids, *texts = zip(*rows, strict=True)
    columns = [
        pyarrow.array(ids),
        *(pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()) for values in texts),
    ]
    other = pyarrow.array([b"\xff"] * 5, pyarrow.binary()).view(pyarrow.string())
    return pyarrow.table([*columns, other], ["id", "prompt", "response", "not_read"])


@pytest.mark.parametrize("form", ["parquet", "large text", "save_to_disk"])
def test_rows_of_tables_are_checked_as_those_of_lines_are(tmp_path: Path, faulty: pyarrow.Table, form: str) -> None:
    folder = tmp_path / "folder"
    if form == "save_to_disk":
        datasets.Dataset(faulty).save_to_disk(str(folder))
    else:
        (folder / "part").mkdir(parents=True)
        if form == "large text":
            large = faulty.column("prompt").cast(pyarrow.binary()).cast(pyarrow.large_binary())
            chunks = [chunk.view(pyarrow.large_string()) for chunk in large.chunks]
            faulty = faulty.set_column(1, "prompt", pyarrow.chunked_array(chunks))
        pyarrow.parquet.write_table(faulty, folder / "part" / "a.parquet")
    name = "folder" if form == "save_to_disk" else "part/a.parquet"
    found = read(folder, "local")
    assert [(record.id, record.prompt) for record in found.records] == [("1", "a\nb"), ("5", "p")]
    assert found.skipped.first == {
        "not_utf8": [f"{name}, row 2: byte 4 of field 'prompt' is not UTF-8"],
        "empty_response": [f"{name}, row 3: the response is empty"],
        "duplicate_id": [f"{name}, row 4: id '1' is used at {name}, row 1 already; ids must be unique"],
    }
    assert found.repaired.first == {"crlf": [f"{name}, row 1"], "byte_order_mark": [f"{name}, row 5"]}
    with pytest.raises(UserError, match=rf"^{name}, row 2: byte 4 .* data\.malformed"):
        read(folder, "local", "fail")


def test_rows_are_numbered_through_all_batches_of_a_table(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": [f"p{n}" for n in range(2500)], "response": ["r"] * 2500})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path, "local")
    assert [record.where for record in found.records] == [f"a.parquet, row {n}" for n in range(1, 2501)]
    assert [record.prompt for record in found.records][-1] == "p2499"


@both_rules
def test_null_in_a_parquet_row_is_refused_with_its_row(tmp_path: Path, malformed: str) -> None:
    datasets.Dataset.from_list([pair(), pair(response="x") | {"response": None}]).to_parquet(
        str(tmp_path / "part.parquet")
    )
    with pytest.raises(UserError, match=r"part\.parquet, row 2: field 'response' is None"):
        read(tmp_path, "local", malformed)


def test_tables_without_the_columns_and_broken_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": ["a"]}), path)
    with pytest.raises(
        UserError, match=r"part\.parquet, row 1: field 'prompt' is missing; a row needs prompt, response"
    ):
        read(tmp_path, "local")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part\.parquet: .*a Parquet file is needed"):
        read(tmp_path, "local")


def test_hidden_files_of_a_folder_are_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(line(pair("seen")) + b"\n")
    plain = read(tmp_path, "local")
    # What editors, macOS and the hub's client leave there.
    for name in (".ipynb_checkpoints/train-checkpoint.jsonl", "._train.jsonl", ".cache/huggingface/x.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(line(pair("hidden")) + b"\n")
    found = read(tmp_path, "local")
    assert prompts(found) == ["seen"]
    assert found.sha256 == plain.sha256
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no state\.json"):
        read(tmp_path, "local")


def test_faults_of_a_folder_name_the_file_in_it(tmp_path: Path) -> None:
    for name in ("a/rows.jsonl", "b/rows.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line(pair(name, id="x")) + b"\r\n")
    found = read(tmp_path, "local")
    assert prompts(found) == ["a/rows.jsonl"]
    assert found.skipped.first["duplicate_id"][0].startswith(
        "b/rows.jsonl, line 1: id 'x' is used at a/rows.jsonl, line 1"
    )
    assert found.repaired.counts == {"byte_order_mark": 2, "crlf": 2}


READ_HUB = """
import json, sys
from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.records import read_records
source = {"kind": "hub", "ref": "someone/rows", "revision": "v1", "sha256": None}
try:
    found = read_records(Source.from_mapping(source), "data.train.source", sys.argv[1])
    print(json.dumps([[r.prompt for r in found.records], found.total, found.skipped.first, found.repaired.first]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def read_hub(folder: Path, content: bytes, malformed: str = "skip", name: str = "rows.jsonl", card: str = "") -> Any:
    """What `read_records` gives for a hub data set of one file: [prompts, total, skipped, repaired], or the error."""
    (folder / "repository").mkdir()
    (folder / "repository" / name).write_bytes(content)
    (folder / "repository" / "README.md").write_text(card)
    with serve("someone/rows", folder / "repository", "datasets") as (endpoint, _):
        done = subprocess.run(
            [sys.executable, "-c", READ_HUB, malformed],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
class TestHub:
    """Files of the kinds that a local source has, read by `datasets` from a hub on this machine."""

    content = (
        MARK.encode()
        + line(pair("a\r\nb", id="1"))
        + b'\r\n\r\n{"prompt": "caf\xe9", "response": "r", "id": "2"}\r\n'
        + b"".join(line(row) + b"\r\n" for row in (pair(response="", id="3"), pair(id="1"), pair(id="5")))
    )

    def test_malformed_rows_are_skipped_and_named(self, tmp_path: Path) -> None:
        prompts, total, skipped, repaired = read_hub(tmp_path, self.content)
        assert (prompts, total) == (["a\nb", "p"], 5)
        assert skipped == {
            "not_utf8": ["someone/rows, row 2: byte 4 of field 'prompt' is not UTF-8"],
            "empty_response": ["someone/rows, row 3: the response is empty"],
            "duplicate_id": ["someone/rows, row 4: id '1' is used at someone/rows, row 1 already; ids must be unique"],
        }
        assert repaired == {"crlf": ["someone/rows, row 1"]}

    def test_malformed_rows_are_fatal_where_the_rule_says(self, tmp_path: Path) -> None:
        error = read_hub(tmp_path, self.content, "fail")
        assert error.startswith("someone/rows, row 2: byte 4 of field 'prompt' is not UTF-8; data.malformed")

    @pytest.mark.parametrize(
        ("row", "error"),
        [
            (b"[]", rf"data.train.source: someone/rows at revision {COMMIT} cannot be read: JSON parse error"),
            (b'{"prompt": "p", "respo', rf"data.train.source: someone/rows at revision {COMMIT} cannot be read: JSON"),
            (b'{"prompt": "q"}', "someone/rows, row 2: field 'response' is None; text is needed"),
        ],
    )
    def test_what_is_no_record_at_all_is_always_fatal(self, tmp_path: Path, row: bytes, error: str) -> None:
        found = read_hub(tmp_path, line(pair()) + b"\n\n" + row + b"\n")
        assert isinstance(found, str)
        assert found.startswith(error)

    @pytest.mark.parametrize(
        ("name", "card", "there"),
        [
            ("test.jsonl", "", "['test']"),
            (
                "rows.jsonl",
                "---\nconfigs:\n- {config_name: en, data_files: rows.jsonl}\n"
                "- {config_name: de, data_files: rows.jsonl}\n---\n",
                "['en', 'de']",
            ),
        ],
    )
    def test_other_splits_and_several_configurations_are_refused_with_what_is_there(
        self, tmp_path: Path, name: str, card: str, there: str
    ) -> None:
        found = read_hub(tmp_path, line(pair()) + b"\n", name=name, card=card)
        assert isinstance(found, str)
        assert found.startswith(f"data.train.source.ref: someone/rows at revision {COMMIT}: ")
        assert there in found
        assert "needs a split 'train' and no more than one configuration" in found
        assert "\n" not in found


def test_missing_sources_are_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.source\.ref: no file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"data\.train\.source\.ref: no folder"):
        read(tmp_path / "absent", "local")
    with pytest.raises(UserError, match=r"holds no state\.json"):
        read(tmp_path, "local")
