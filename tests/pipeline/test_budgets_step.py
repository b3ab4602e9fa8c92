"""`sdtp budgets`: the examples of another environment, with the mean of a schedule's cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from sdtp.pipeline.steps import budgets

SETTINGS = {"pruning": {"start": 1, "step": 1, "sinks": 4, "local": 0.1, "min_local": 8}}


def test_entries_are_the_mean_over_layers_of_what_a_schedule_leaves(tmp_path: Path) -> None:
    examples = [
        {"id": "long", "task": "retrieval", "prompt_ids": list(range(100)), "response_ids": [7, 8], "prompt": "text"},
        {"id": "short", "task": "continuation", "prompt_ids": list(range(10)), "response_ids": [9], "prompt": "text"},
    ]
    Dataset.from_list(examples).save_to_disk(tmp_path / "data" / "test")
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"splits": {"test": {"content_sha256": "0" * 64}}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"num_layers": 4}))
    output = tmp_path / "budgets.jsonl"
    folders = ["--model", str(tmp_path), "--data", str(tmp_path / "data"), "--metrics", str(tmp_path / "metrics.json")]
    settings = ["--settings", json.dumps(SETTINGS), "--keep-ratio", "0.5"]
    budgets.main([*settings, *folders, "--output", str(output)])
    # 100, 50, 25 and 12 tokens in the four layers; of the short prompt all, since 4 + 8 are protected.
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"id": "long", "task": "retrieval", "prompt_ids": list(range(100)), "response_ids": [7, 8], "entries": 47},
        {"id": "short", "task": "continuation", "prompt_ids": list(range(10)), "response_ids": [9], "entries": 10},
    ]
    assert json.loads((tmp_path / "metrics.json").read_text())["kept_share"] == (0.47 + 1) / 2


def test_prompts_that_are_timed_have_no_response(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps({"source": "text", "ids": list(range(200))}))
    (tmp_path / "manifest.json").write_text(json.dumps({"num_layers": 4}))
    output = tmp_path / "budgets.jsonl"
    folders = [
        "--model",
        str(tmp_path),
        "--text",
        str(tmp_path / "text.json"),
        "--metrics",
        str(tmp_path / "metrics.json"),
    ]
    settings = ["--settings", json.dumps(SETTINGS | {"peers": {"prompt_tokens": [100, 12]}}), "--keep-ratio", "0.5"]
    budgets.main([*settings, *folders, "--output", str(output)])
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"id": "100", "task": None, "prompt_ids": list(range(100)), "response_ids": [], "entries": 47},
        {"id": "12", "task": None, "prompt_ids": list(range(12)), "response_ids": [], "entries": 12},
    ]


def test_rows_of_a_suite_stay_whole_and_ids_may_repeat(tmp_path: Path) -> None:
    rows = [
        {
            "suite": "longbench",
            "id": "1",
            "task": task,
            "prompt_ids": list(range(tokens)),
            "context": [2, 9],
            "chat": True,
        }
        for task, tokens in (("qasper", 100), ("lcc", 10))
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "manifest.json").write_text(json.dumps({"num_layers": 4}))
    output = tmp_path / "budgets.jsonl"
    files = ["--model", str(tmp_path), "--suite", str(tmp_path / "examples.jsonl"), "--output", str(output)]
    settings = ["--settings", json.dumps(SETTINGS), "--keep-ratio", "0.5", "--metrics", str(tmp_path / "metrics.json")]
    budgets.main([*settings, *files])
    # The mean of 100, 50, 25 and 12, not the 12 of the last layer.
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {**rows[0], "entries": 47},
        {**rows[1], "entries": 10},
    ]
    with pytest.raises(SystemExit):
        budgets.main([*settings, *files, "--timed"])
