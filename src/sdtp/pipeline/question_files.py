"""Reads the questions of a folder of lm-eval tasks: `harness_tasks` copies this module beside them.

A task's YAML names its data by a path that depends on where lm-eval is called from, or by a function of a module beside
it. With this one the folder can be moved, and lm-eval keeps no copy of the data in the user's home.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

SPLITS = ("train", "test")


def load(*, questions: str, **settings: Any) -> DatasetDict:
    """The splits of a task, from `<questions>-train.jsonl` and `<questions>-test.jsonl` beside this module.

    Args:
        questions: stated in the YAML's `dataset_kwargs`.
        **settings: what lm-eval hands over beside it, the model's arguments for one; of no use here.
    """
    return DatasetDict({split: Dataset.from_list(_rows(f"{questions}-{split}.jsonl")) for split in SPLITS})


def _rows(name: str) -> list[dict[str, Any]]:
    # Not by `splitlines`: characters of a text, U+2028 for one, would end its line.
    with Path(__file__).with_name(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
