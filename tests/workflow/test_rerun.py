"""Reruns are exact: a change runs again what uses it and what comes after, and nothing else (cases D3, D4)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdtp.pipeline.data_folder import load_split
from tests.workflow.project import changed_tiny, overlay, planned, snakemake

pytestmark = pytest.mark.slow

GATHERED = {"tables", "figures", "report", "register"}
BENCHMARKS = {"benchmark/0.8", "benchmark/0.5"}
GENERATIONS = {"generate/0.8", "generate/0.5"}
SDTP = {"evaluate/sdtp-0.8", "evaluate/sdtp-0.5"}
RANDOM = {"evaluate/random-0.8", "evaluate/random-0.5"}
UNPRUNED = {"evaluate/unpruned-1.0"}
FROM_TRAIN = {"train"} | BENCHMARKS | GENERATIONS | SDTP | GATHERED
FROM_SALIENCY = {"saliency/0", "saliency/1", "saliency-index"} | FROM_TRAIN
FROM_TEST = {"test-data", "reference"} | GENERATIONS | SDTP | RANDOM | UNPRUNED | GATHERED
FROM_DATA = {"data"} | FROM_SALIENCY | FROM_TEST
ALL = {"model", "check", "benchmark-text"} | FROM_DATA

CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"seed": 1}, FROM_DATA),
    ({"model": {"trust_remote_code": True}}, ALL),
    ({"model": {"dtype": "float16"}}, {"reference"} | FROM_SALIENCY | RANDOM | UNPRUNED),
    ({"data": {"max_tokens": 300}}, FROM_DATA | {"check"}),
    ({"data": {"distractors": 3}}, FROM_DATA),
    ({"data": {"train": {"examples": 9}}}, {"data"} | FROM_SALIENCY),
    ({"data": {"test": {"examples": 3}}}, FROM_TEST),
    ({"pruning": {"step": 2}}, FROM_SALIENCY | RANDOM | {"check"}),
    ({"pruning": {"sinks": 5}}, FROM_TRAIN | RANDOM),
    (
        {"pruning": {"keep_ratios": [0.8, 0.6]}},
        {"generate/0.6", "benchmark/0.6", "evaluate/sdtp-0.6", "evaluate/random-0.6"} | GATHERED,
    ),
    ({"pruning": {"keep_ratios": [0.5, 0.8]}}, GATHERED),
    ({"saliency": {"reduction": "l2"}}, FROM_SALIENCY),
    ({"saliency": {"batch_tokens": 300}}, FROM_SALIENCY),
    ({"training": {"steps": 5}}, FROM_TRAIN),
    ({"training": {"weights": {"mse": 0}}}, FROM_TRAIN),
    ({"training": {"keep_ratio": 0.7}}, FROM_TRAIN),
    ({"generation": {"max_new_tokens": 5}}, GENERATIONS | {"figures", "report", "check"}),
    ({"benchmark": {"repeats": 6}}, BENCHMARKS | GATHERED),
    ({"evaluation": {"seeds": [0, 2]}}, RANDOM | GATHERED),
    ({"evaluation": {"batch_tokens": 512}}, {"reference"} | SDTP | RANDOM | UNPRUNED | GATHERED),
    (
        {"evaluation": {"methods": ["sdtp", "random", "recent"]}},
        {"evaluate/recent-0.8", "evaluate/recent-0.5"} | GATHERED,
    ),
    ({"tracking": {"experiment": "other"}}, set()),
]


def test_whole_workflow_ran(finished_run: Path) -> None:
    results = finished_run / "results" / "tiny"
    assert "24 of 24 steps (100%) done" in (finished_run / "snakemake.txt").read_text(encoding="utf-8")
    assert (results / "report.html").stat().st_size > 10_000
    assert len(list((results / "metrics").iterdir())) == 22  # figures has no number to tell
    assert len(list((results / "resources").iterdir())) == 23
    logs = {path.relative_to(finished_run / "logs" / "tiny"): path for path in (finished_run / "logs").rglob("*.log")}
    assert len(logs) == 23
    for path in logs.values():
        assert re.search(r"^[a-z-]+: done in \d+\.\d s$", path.read_text(encoding="utf-8"), flags=re.MULTILINE), path


@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_changed_setting_reruns_what_uses_it(
    finished_run: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert planned(finished_run, "--configfile", overlay(tmp_path / "changed.yaml", change)) == jobs


def test_of_records_another_training_set_makes_another_test_set(project: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "response": "answer"} for number in range(20)]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "ref": "rows.jsonl", "revision": None, "sha256": None}
    data = {"train": {"source": source, "examples": 10, "heldout": 4}, "test": {"source": source, "examples": 6}}
    few = overlay(tmp_path / "few.yaml", {"run": "records", "data": data})
    target = "results/records/test-data"
    snakemake(project, target, "--configfile", few)
    folders = {"train": "data", "heldout": "data", "test": "test-data"}
    splits = [load_split(project / "results" / "records" / folder, split) for split, folder in folders.items()]
    assert sorted(prompt for split in splits for prompt in split["prompt"]) == sorted(row["prompt"] for row in rows)
    fewer = overlay(
        tmp_path / "fewer.yaml", {"run": "records", "data": data | {"train": data["train"] | {"examples": 9}}}
    )
    assert planned(project, target, "--configfile", fewer) == {"data", "test-data"}


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_nothing_to_do_whatever_the_hash_seed(finished_run: Path, seed: str) -> None:
    output = snakemake(finished_run, "--configfile", "tiny.yaml", PYTHONHASHSEED=seed).stdout
    assert "Nothing to be done" in output
    assert "Checking the 16 steps of run tiny: model, check, data, test_data, benchmark_text, saliency" in output


def test_nothing_to_do_with_keys_in_another_order_and_numbers_written_otherwise(
    finished_run: Path, tmp_path: Path
) -> None:
    def backwards(value: Any) -> Any:
        return {key: backwards(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    config = changed_tiny({"training": {"steps": 4.0, "temperature": 1, "weights": {"rank": 1}}})
    path = tmp_path / "backwards.yaml"
    path.write_text(yaml.safe_dump(backwards(config), sort_keys=False), encoding="utf-8")
    assert planned(finished_run, "--configfile", str(path)) == set()


def test_nothing_to_do_in_another_folder_or_with_other_cores(project: Path) -> None:
    assert planned(project, "--configfile", "tiny.yaml", "--cores", "1") == set()


def test_words_rerun_nothing(project: Path) -> None:
    (project / "README.md").write_text("rewritten\n", encoding="utf-8")
    for path in (project / "src" / "sdtp").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        path.write_text(source.replace('"""', '"""Reworded: ', 1) + "\n# a comment\n", encoding="utf-8")
    assert planned(project, "--configfile", "tiny.yaml") == set()


@pytest.mark.parametrize(
    ("edited", "jobs"),
    [
        ("pipeline/plots.py", {"figures", "report"}),
        ("pipeline/report.py", {"report"}),
        ("pipeline/templates/report.html.j2", {"report"}),
        ("training/trainer.py", FROM_TRAIN),
        ("pipeline/tracking.py", set()),
        ("cli.py", set()),
    ],
)
def test_edited_code_reruns_the_steps_it_decides(project: Path, edited: str, jobs: set[str]) -> None:
    with (project / "src" / "sdtp" / edited).open("a", encoding="utf-8") as file:
        file.write("\nEDITED = True\n")
    assert planned(project, "--configfile", "tiny.yaml") == jobs


def test_changed_file_of_the_users_own_reruns_what_reads_it(project: Path) -> None:
    with (project / "tiny-model" / "config.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert planned(project, "--configfile", "tiny.yaml") == ALL


def test_deleted_figure_is_drawn_again(project: Path) -> None:
    figure = project / "results" / "tiny" / "figures" / "quality.svg"
    drawn = figure.read_bytes()
    figure.unlink()
    assert planned(project, "--configfile", "tiny.yaml") == {"figures", "report"}
    snakemake(project, str(figure.relative_to(project)), "--configfile", "tiny.yaml")
    assert figure.read_bytes() == drawn


def test_added_keep_ratio_joins_the_tables_without_the_old_one(project: Path, tmp_path: Path) -> None:
    config = overlay(tmp_path / "changed.yaml", {"pruning": {"keep_ratios": [0.8, 0.6]}})
    before = (project / "results" / "tiny" / "pruner" / "pruner.safetensors").stat().st_mtime_ns
    snakemake(project, "results/tiny/tables/quality.csv", "--configfile", config)
    rows = (project / "results" / "tiny" / "tables" / "quality.csv").read_text(encoding="utf-8").splitlines()
    columns = rows[0].split(",")
    assert {row.split(",")[columns.index("keep_ratio")] for row in rows[1:]} == {"1.0", "0.8", "0.6"}
    assert (project / "results" / "tiny" / "pruner" / "pruner.safetensors").stat().st_mtime_ns == before
