"""Reads the folders of examples that steps `data` and `test-data` make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdtp.errors import UserError
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.rows import read_saved

if TYPE_CHECKING:
    from datasets import Dataset

# What a pruner learns from, and by what it is seen how well; what its quality is measured on.
TRAINING, TEST_SPLIT = ("train", "heldout"), "test"
SPLITS = (*TRAINING, TEST_SPLIT)


def load_split(data_dir: str | Path, split: str) -> Dataset:
    """One split of a data folder: columns id, task, prompt_ids, response_ids, prompt, response, source.

    Raises:
        UserError: the folder has no such split.
    """
    folder = Path(data_dir) / split
    if split not in SPLITS or not folder.is_dir():
        raise UserError(
            f"{folder}: no such split; a folder of `sdtp data` has {' and '.join(TRAINING)}, one of `sdtp test-data` "
            f"has {TEST_SPLIT}"
        )
    return read_saved(folder)


def split_hash(data_dir: str | Path, split: str) -> str:
    """The content hash of one split, from the manifest of its data folder."""
    return str(read_json(Path(data_dir) / "manifest.json")["splits"][split]["content_sha256"])
