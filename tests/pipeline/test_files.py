"""Files are whole or absent, whatever happens; JSON lines are read strictly and say where they are wrong."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.files import atomic_folder, canonical_json, read_jsonl, sha256_file, write_atomically, write_jsonl


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt and the like, which are no Exceptions."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_shows_under_the_final_name_before_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.csv"
    with write_atomically(target) as temporary:
        temporary.write_text("a,b\n")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == ".csv"  # pandas and matplotlib choose the format by it
    assert target.read_text() == "a,b\n"
    assert names(target.parent) == ["table.csv"]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")

    def fail() -> None:
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_writing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "x"):
        pass


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    code = (
        "import sys, os, signal\n"
        "from sdtp.pipeline.files import write_atomically\n"
        "with write_atomically(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(target)], check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "stale.bin").write_bytes(b"1")
    with atomic_folder(target) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "weights.bin").write_bytes(b"2")
        assert names(target) == ["stale.bin"]
    assert [str(path.relative_to(target)) for path in sorted(target.rglob("*"))] == ["deep", "deep/weights.bin"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_folder_leaves_the_old_one_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "weights.bin").write_bytes(b"1")

    def fail() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "weights.bin").write_bytes(b"2")
            raise error

    with pytest.raises(error):
        fail()
    assert (target / "weights.bin").read_bytes() == b"1"
    assert names(tmp_path) == ["model"]


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "weights.bin").write_bytes(b"1")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as temporary:
        os.rmdir(temporary)  # what a clean-up script might do
    assert (target / "weights.bin").read_bytes() == b"1"
    assert names(tmp_path) == ["model"]


def test_sha256_covers_files_larger_than_a_block(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_canonical_json_does_not_depend_on_key_order() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": "ü"}}) == '{"a":{"c":"ü","d":null},"b":[1,2.5]}'
    assert canonical_json({"a": {"c": "ü", "d": None}, "b": [1, 2.5]}) == '{"a":{"c":"ü","d":null},"b":[1,2.5]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_numbers_it_cannot_hold(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"loss": value})
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(tmp_path / "x.jsonl", [{"loss": value}])
    assert names(tmp_path) == []


def test_jsonl_round_trip_keeps_key_order_and_odd_characters(tmp_path: Path) -> None:
    # U+2028 and U+0085 end a line for str.splitlines, not for JSON lines.
    rows: list[dict[str, Any]] = [{"b": 1, "a": "x\u2028y\u0085z\nü"}, {"c": [True, None]}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert len((tmp_path / "x.jsonl").read_bytes().splitlines()) == 2
    again = read_jsonl(tmp_path / "x.jsonl")
    assert again == rows
    assert list(again[0]) == ["b", "a"]


def test_jsonl_blank_lines_and_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"context": 1}\r\n\n   \n{"context": 2}')
    assert read_jsonl(path) == [{"context": 1}, {"context": 2}]


@pytest.mark.parametrize("bad", [b"[]", b'{"a": ', b"null", b'"text"', b"3", b'{"a": "\xff"}', b'{"a": 1} {"a": 2}'])
def test_jsonl_errors_name_file_and_physical_line(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n' + bad + b"\n")
    with pytest.raises(UserError, match=r"records\.jsonl, line 4: .*a JSON object is needed") as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)
