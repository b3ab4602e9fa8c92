"""What only model and text reveal is refused before any GPU work, and the check costs no rerun of what it guards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workflow.project import overlay, planned, snakemake
from tests.workflow.test_rerun import BENCHMARKS, FROM_DATA, FROM_SALIENCY, GATHERED, GENERATIONS, RANDOM

pytestmark = pytest.mark.slow


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"benchmark": {"prompt_tokens": [64, 96]}}, BENCHMARKS | GATHERED),
    ({"generation": {"max_new_tokens": 5}}, GENERATIONS | {"figures", "report"}),
    ({"pruning": {"step": 2}}, FROM_SALIENCY | RANDOM),
    ({"data": {"malformed": "fail"}}, FROM_DATA | {"benchmark-text"}),
]


@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_check_comes_with_what_a_change_reruns_and_adds_nothing_else(
    finished_run: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert planned(finished_run, "--configfile", overlay(tmp_path / "changed.yaml", change)) == {"check"} | jobs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The first change would also run saliency again, the second one also the data.
        ({"pruning": {"start": 9}}, "error: pruning.start: 9 is no layer to prune at; the model has 4 layers"),
        (
            {"seed": 1, "benchmark": {"prompt_tokens": [1023], "new_tokens": 2}},
            "error: 1023 (benchmark.prompt_tokens) + 2 (benchmark.new_tokens) = 1025 tokens: the model's context has",
        ),
    ],
    ids=["start", "length"],
)
def test_settings_the_model_has_no_room_for_are_refused_first_and_leave_everything_as_it_was(
    project: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    process = snakemake(project, "--configfile", overlay(tmp_path / "bad.yaml", change), check=False)
    assert process.returncode == 1
    assert message in process.stdout
    assert "Stage 1" not in process.stdout
    assert "okenising" not in process.stdout
    assert planned(project, "--configfile", "tiny.yaml") == {"check"}


def test_lengths_that_the_text_is_too_short_for_are_refused_before_the_data_are_made(
    project: Path, tmp_path: Path
) -> None:
    (project / "rows.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    source = {"kind": "jsonl", "ref": "rows.jsonl", "revision": None, "sha256": None}
    config = overlay(tmp_path / "short.yaml", {"data": {"test": {"source": source}}})
    process = snakemake(project, "--configfile", config, check=False)
    assert process.returncode == 1
    assert "error: benchmark.prompt_tokens: 64 is not in 1.." in process.stdout
    assert "the benchmark's text, made of data.test.source rows.jsonl" in process.stdout
    assert "Stage 1" not in process.stdout
    assert "okenising" not in process.stdout


def test_prompts_beyond_the_context_are_refused_in_the_data_step(project: Path, tmp_path: Path) -> None:
    config = overlay(tmp_path / "bad.yaml", {"data": {"max_tokens": 1000}})
    process = snakemake(project, "--configfile", config, check=False)
    assert process.returncode == 1
    assert "error: 1000 (data.max_tokens) + 32 (longest response) = 1032 tokens: the model's context has 1024" in (
        process.stdout
    )
    assert "Stage 1" not in process.stdout
