"""A folder of local tasks for lm-evaluation-harness: questions as JSON lines, a YAML a task."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from sdtp.pipeline import question_files
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.multiple_choice import Question


class _Function(str):
    """What lm-eval's YAML marks as `!function`: a function of a module beside it."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_task(folder: Path, task: str, splits: Mapping[str, Sequence[Question]]) -> None:
    """Writes one task into a folder that exists: `<task>.yaml`, `<task>-train.jsonl`, `<task>-test.jsonl`, a reader.

    `lm_eval --include_path FOLDER --tasks <task>` finds it, wherever the folder is.

    Args:
        folder: of one or more tasks.
        task: its name in lm-eval.
        splits: the questions of `train`, which few-shot examples are drawn from, and of `test`.
    """
    for split in question_files.SPLITS:
        write_jsonl(folder / f"{task}-{split}.jsonl", map(dataclasses.asdict, splits[split]))
    shutil.copyfile(question_files.__file__, folder / "question_files.py")
    config = {
        "task": task,
        "custom_dataset": _Function("question_files.load"),
        "dataset_kwargs": {"questions": task},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0},
    }
    text = yaml.dump(config, Dumper=_Dumper, sort_keys=False)
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
