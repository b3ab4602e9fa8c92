"""What writers hold and append to, on a disk that is full: the file is named, an error of the work is left as it is."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdtp.pipeline.locks import lock_file, only_writer
from sdtp.pipeline.predictions import Answer, Predictions


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process can grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lock_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as raised, no_room(), only_writer(tmp_path / "model"):
        pytest.fail("it is not held")
    assert raised.value.filename == str(lock_file(tmp_path / "model"))
    with only_writer(tmp_path / "model"):  # and is nobody's
        pass


def test_fault_of_the_work_is_not_taken_for_the_locks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as raised, only_writer(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename is None


def test_predictions_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    path = tmp_path / "sdtp-0.8.jsonl"
    predictions = Predictions(path, Answer)
    with pytest.raises(OSError, match="File too large") as raised, no_room():
        predictions.add("k1", Answer(prediction="x", kept_tokens=7))
    assert raised.value.filename == str(path)
    assert "k1" not in predictions
