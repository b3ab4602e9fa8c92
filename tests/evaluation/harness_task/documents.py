"""The task's questions, from JSONL files beside this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def load(**settings: Any) -> DatasetDict:
    """`train` is what few-shot examples are drawn from; lm-eval hands over the model's arguments, of no use here."""
    return DatasetDict({split: Dataset.from_list(_rows(split)) for split in ("train", "test")})


def _rows(split: str) -> list[dict[str, Any]]:
    lines = Path(__file__).with_name(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
