"""A hub that does not answer, or has no such thing, is one line that names the source, whatever is read from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.hub import dataset_commit
from sdtp.pipeline.longbench_data import read_longbench
from sdtp.pipeline.model_sources import fetch_model
from sdtp.pipeline.rows import read_rows
from tests.pipeline.hub import COMMIT, serve

READERS: dict[str, Callable[[Source, Path], object]] = {
    "model.source": lambda source, folder: fetch_model(source, folder / "model"),
    "data.train.source": lambda source, folder: read_rows(source, "data.train.source"),
    "suites.longbench.source": lambda source, folder: read_longbench(source, "suites.longbench.source", ["qasper"]),
}


@pytest.mark.parametrize("key", READERS)
def test_out_of_reach_or_absent(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    with serve("someone/here", tmp_path / "repository") as (endpoint, _):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for ref in ("someone/else", "not/a/name"):
            with pytest.raises(UserError, match=f"^{key}: no '{ref}' at revision 'v1' on the hub$"):
                READERS[key](Source("hub", ref, "v1", None), tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    words = f"^{key}: 'someone/here' at revision 'v1' cannot be had from the hub: .*refused.*HF_HUB_OFFLINE=1"
    with pytest.raises(UserError, match=words):
        READERS[key](Source("hub", "someone/here", "v1", None), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


READ_ROWS = """
import sys
from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.rows import read_rows
try:
    read = read_rows(Source("hub", "someone/rows", sys.argv[1], None), "data.train.source")
    print(*(row.fields["prompt"] for row in read.rows), read.revision)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_offline_rows_of_a_commit_in_the_cache_are_read_and_never_taken_for_anothers(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "rows.jsonl").write_text('{"prompt": "p", "response": "r"}\n')

    def read(endpoint: str, revision: str, offline: int) -> str:
        process = subprocess.run(
            [sys.executable, "-c", READ_ROWS, revision],
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": str(offline),
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    with serve("someone/rows", tmp_path / "repository", "datasets") as (endpoint, _):
        assert read(endpoint, COMMIT, 0) == f"p {COMMIT}"
    assert read(endpoint, COMMIT, 1) == f"p {COMMIT}"
    other = "f" * 40
    refused = f"data.train.source: 'someone/rows' at revision '{other}' cannot be had from the hub: the cache has it at"
    assert read(endpoint, other, 1).startswith(f"{refused} {COMMIT} alone; ")


def test_commit_of_a_branch_is_asked_for_and_a_commit_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve("someone/rows", tmp_path, "datasets") as (endpoint, requests):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for revision in ("v1", None):
            assert dataset_commit(Source("hub", "someone/rows", revision, None)) == COMMIT
        assert len(requests) == 2
        assert dataset_commit(Source("hub", "someone/rows", "f" * 40, None)) == "f" * 40
        assert len(requests) == 2
