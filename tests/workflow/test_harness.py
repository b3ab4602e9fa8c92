"""`snakemake harness`: what it plans, what the tiny run gives, and that a change reruns what uses it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdtp.evaluation.names import PAPER_TASKS
from sdtp.pipeline.multiple_choice import LOCAL_TASKS
from tests.workflow.golden import resolved
from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

UNPRUNED, SDTP, RANDOM = "harness/unpruned-1.0", "harness/sdtp-0.5", "harness/random-0.5"
ANSWERS = {UNPRUNED, SDTP, RANDOM}
TABLE = {"harness-table"}
DATA = {"multiple-choice-data"}


@pytest.fixture(scope="module")
def answered(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with the questions answered as well. Not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("answered") / "sdtp", symlinks=True)
    process = snakemake(folder, "harness", "--configfile", "tiny.yaml")
    assert job_counts(process.stdout) == {"multiple_choice_data": 1, "harness_answers": 3, "harness_table": 1}
    return folder


def test_default_tasks_are_the_projects_own_and_the_papers_stand_in_its_configurations() -> None:
    assert resolved("config.yaml")["harness"]["tasks"] == list(LOCAL_TASKS)
    for name in ("qwen2-7b", "mistral-7b", "llama2-7b", "bloom-7b"):
        harness = resolved(f"paper/{name}.yaml")["harness"]
        assert harness["tasks"] == [*PAPER_TASKS, *LOCAL_TASKS]
        assert (harness["fewshot"], harness["limit"]) == (5, None)


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "made"), [(["sdtp_fact", "piqa"], 1), (["piqa", "copa"], 0)])
def test_questions_are_made_where_they_are_asked(tmp_path: Path, tasks: list[str], made: int) -> None:
    clone = copy_project(tmp_path / "sdtp")
    (clone / "own.yaml").write_text(f"harness: {{tasks: [{', '.join(tasks)}], keep_ratios: [0.6]}}\n")
    output = snakemake(clone, "harness", "--dry-run", "--configfile", "own.yaml").stdout
    counts = job_counts(output)
    assert counts.get("multiple_choice_data", 0) == made
    assert counts["harness_answers"] == 3
    assert ("--tasks results/default/harness/tasks" in output) == bool(made)
    assert "report" not in counts


@pytest.mark.slow
def test_a_folder_of_own_tasks_is_quoted_for_the_shell(tmp_path: Path) -> None:
    clone = copy_project(tmp_path / "sdtp")
    folder = clone / "o'brien; my $tasks"
    folder.mkdir()
    (folder / "own.yaml").write_text("task: own\n")
    (clone / "own.yaml").write_text(f'harness: {{tasks: [sdtp_fact, own], include: "{folder.name}"}}\n')
    output = snakemake(clone, "harness", "--dry-run", "--configfile", "own.yaml").stdout
    commands = [line for line in output.splitlines() if line.startswith("Shell command: ") and " harness --" in line]
    assert commands
    for command in commands:
        words = shlex.split(command)
        at = words.index("--tasks")
        assert words[at + 1 : at + 3] == ["results/default/harness/tasks", folder.name]


@pytest.mark.slow
def test_rows_and_table_hold_what_the_settings_ask_for(answered: Path) -> None:
    results = answered / "results" / "tiny"
    rows = {
        name: [json.loads(line) for line in (results / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ANSWERS
    }
    ids = [f"{task}-{number:05d}" for task in ("sdtp_fact", "sdtp_next") for number in range(3)]
    assert [row["id"] for row in rows[UNPRUNED]] == [row["id"] for row in rows[SDTP]] == ids
    assert [(row["seed"], row["id"]) for row in rows[RANDOM]] == [(seed, id_) for seed in (0, 1) for id_ in ids]
    for one, other in zip(rows[UNPRUNED], rows[SDTP], strict=True):
        # Three stages that keep half, and no more than is protected.
        assert one["kept_tokens"] == one["prompt_tokens"] == other["prompt_tokens"] > 4 * other["kept_tokens"]
        assert one["log_likelihoods"] != other["log_likelihoods"]
    for name in ANSWERS:
        for result in json.loads((results / f"{name}.json").read_text(encoding="utf-8")):
            assert result["n-shot"] == {"sdtp_fact": 2, "sdtp_next": 2}
    table = pd.read_csv(results / "tables" / "harness.csv")
    assert list(zip(table["task"], table["method"], table["n"], strict=True)) == [
        (task, method, n)
        for task, n in (("all", 6), ("sdtp_fact", 3), ("sdtp_next", 3))
        for method in ("unpruned", "sdtp", "random")
    ]
    for kind in ("svg", "png"):
        assert (results / "figures" / f"harness.{kind}").stat().st_size > 5000


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"harness": {"fewshot": 1}}, ANSWERS | TABLE),
    ({"harness": {"limit": 2}}, ANSWERS | TABLE),
    ({"harness": {"batch_size": 2}}, ANSWERS | TABLE),
    ({"harness": {"local": {"questions": 2}}}, DATA | ANSWERS | TABLE),
    ({"harness": {"tasks": ["sdtp_fact"]}}, DATA | ANSWERS | TABLE),
    ({"harness": {"methods": ["sdtp"]}}, TABLE),
    ({"harness": {"methods": ["sdtp", "random", "recent"]}}, {"harness/recent-0.5"} | TABLE),
    ({"harness": {"keep_ratios": [0.5, 0.7]}}, {"harness/sdtp-0.7", "harness/random-0.7"} | TABLE),
    ({"evaluation": {"seeds": [0, 2]}}, {RANDOM} | TABLE),
    ({"pruning": {"sinks": 5}}, {SDTP, RANDOM} | TABLE | {"train"}),
    ({"generation": {"max_new_tokens": 5}}, set()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_changed_setting_reruns_what_uses_it(
    answered: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert planned(answered, "harness", "--configfile", overlay(tmp_path / "changed.yaml", change)) == jobs
