"""Which files of the user's own a configured source reads."""

import re
from pathlib import Path

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.sources import own_files


def test_a_folders_visible_files_and_a_lone_file_are_listed(tmp_path: Path) -> None:
    for name in ("b.json", "a/weights.safetensors", ".git/config", "a/.cache"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert own_files({"kind": "local", "ref": str(tmp_path)}, "model.source.ref") == [
        str(tmp_path / "a" / "weights.safetensors"),
        str(tmp_path / "b.json"),
    ]
    lone = str(tmp_path / "b.json")
    assert own_files({"kind": "jsonl", "ref": lone}, "data.test.source.ref") == [lone]
    assert own_files(
        {"kind": "jsonl", "ref": str(tmp_path / "a" / ".cache")}, "data.test.source.ref"
    )  # named by the user
    for kind in ("hub", "package"):
        assert own_files({"kind": kind, "ref": "some/name"}, "model.source.ref") == []


@pytest.mark.parametrize(("kind", "what"), [("jsonl", "file"), ("local", "folder")])
def test_a_missing_path_is_named_with_its_key(tmp_path: Path, kind: str, what: str) -> None:
    with pytest.raises(UserError, match=rf"data\.train\.source\.ref: no {what} '.*absent'"):
        own_files({"kind": kind, "ref": str(tmp_path / "absent")}, "data.train.source.ref")


@pytest.mark.parametrize("name", ["rows{x}.jsonl", "<b>/rows.jsonl"])
@pytest.mark.parametrize("kind", ["jsonl", "local"])
def test_a_name_that_snakemake_would_read_as_its_own_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    ref = str(path if kind == "jsonl" else tmp_path)
    with pytest.raises(UserError, match=rf"data\.test\.source\.ref: '{re.escape(str(path))}' .* without \{{}}<> is"):
        own_files({"kind": kind, "ref": ref}, "data.test.source.ref")
