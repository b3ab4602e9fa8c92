"""`snakemake suites` on the tiny run: what it makes, what a change of settings makes again, and what is taken over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.pipeline.test_suite_steps import longbench_folder
from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

pytestmark = pytest.mark.slow

LONGBENCH = {
    "suites": {
        "longbench": {
            "source": {"kind": "local", "ref": "longbench", "revision": None, "sha256": None},
            "tasks": ["trec", "qasper"],
            "max_tokens": 300,
            "examples": 2,
        }
    }
}
CELLS = ("unpruned-1.0", "sdtp-half-0.5", "random-0.5")


@pytest.fixture(scope="module")
def finished(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run in which both suites were run as well. Not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("suites") / "sdtp", symlinks=True)
    longbench_folder(folder / "longbench")
    process = snakemake(folder, "suites", "--configfile", overlay(folder / "suites.yaml", LONGBENCH))
    assert job_counts(process.stdout) == {
        "ruler_data": 1,
        "longbench_data": 1,
        "predict": 6,
        "score": 6,
        "ruler_table": 1,
        "longbench_table": 1,
    }
    return folder


def test_suites_are_no_part_of_the_run_and_longbench_needs_its_data(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    output = snakemake(folder, "--dry-run", "suites").stdout
    counts = job_counts(output)
    assert (counts["ruler_data"], counts["predict"], counts["score"], counts["ruler_table"]) == (1, 4, 4, 1)
    assert not [name for name in counts if "longbench" in name]
    assert not [
        name for name in job_counts(snakemake(folder, "--dry-run").stdout) if name in counts and "ruler" in name
    ]


def test_tables_hold_the_scores_of_every_method(finished: Path) -> None:
    results = finished / "results" / "tiny"
    for suite, lengths in (("ruler", {400, 500}), ("longbench", set())):
        table = pd.read_csv(results / "tables" / f"{suite}.csv")
        assert list(dict.fromkeys(zip(table["method"], table["keep_ratio"], strict=True))) == [
            ("unpruned", 1.0),
            ("sdtp-half", 0.5),
            ("random", 0.5),
        ]
        assert set(table["length"].dropna()) == lengths
        own = table[table["length"].isna()]
        for cell in CELLS:
            path = results / "suites" / suite / "scores" / f"{cell}.jsonl"
            scored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            method, ratio = cell.rsplit("-", 1)
            for task in {row["task"] for row in scored}:
                values = [row["score"] for row in scored if row["task"] == task]
                (found,) = own[(own["task"] == task) & (own["method"] == method)]["value"]
                assert found == pytest.approx(sum(values) / len(values))
            seeds = {row["seed"] for row in scored}
            assert seeds == ({0, 1} if method == "random" else {None})
            assert float(ratio) in set(own["keep_ratio"])
    figures = results / "figures"
    for name in ("suite-ruler", "ruler-heatmap", "suite-longbench"):
        for kind in ("svg", "png"):
            assert (figures / f"{name}.{kind}").stat().st_size > 3000


DATA = {"ruler-data", *(f"predict/ruler/{cell}" for cell in CELLS), *(f"score/ruler/{cell}" for cell in CELLS)}
GATHERED = {"suite-table/ruler", "suite-table/longbench"}
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"suites": {"ruler": {"examples": 3}}}, DATA | {"suite-table/ruler"}),
    (
        {"suites": {"methods": ["sdtp-half", "random", "recent"]}},
        {f"{step}/{suite}/recent-0.5" for step in ("predict", "score") for suite in ("ruler", "longbench")} | GATHERED,
    ),
    ({"suites": {"methods": ["random", "sdtp-half"]}}, GATHERED),
    (
        {"evaluation": {"seeds": [0]}},
        {f"{step}/{suite}/random-0.5" for step in ("predict", "score") for suite in ("ruler", "longbench")} | GATHERED,
    ),
    ({"suites": {"longbench": {"source": None}}}, set()),
    ({"benchmark": {"repeats": 6}}, set()),
]


@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_changed_setting_reruns_what_uses_it(
    finished: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert planned(finished, "suites", "--configfile", overlay(tmp_path / "changed.yaml", LONGBENCH, change)) == jobs


def test_more_examples_are_predicted_beside_those_there_are(finished: Path, tmp_path: Path) -> None:
    project = shutil.copytree(finished, tmp_path / "sdtp", symlinks=True)
    config = overlay(project / "suites.yaml", LONGBENCH, {"suites": {"ruler": {"examples": 3}}})
    snakemake(project, "suites", "--configfile", config)
    results = project / "results" / "tiny"
    metrics = json.loads((results / "metrics" / "predict-ruler-random-0.5.json").read_text(encoding="utf-8"))
    # Two seeds: of three examples of two tasks at two lengths, and two of each were there.
    assert (metrics["predictions"], metrics["predictions_taken_over"]) == (24, 16)
    assert planned(project, "suites", "--configfile", config) == set()


def test_changed_data_of_longbench_rerun_what_reads_them(finished: Path, tmp_path: Path) -> None:
    project = shutil.copytree(finished, tmp_path / "sdtp", symlinks=True)
    with (project / "longbench" / "trec.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    own = {f"{step}/longbench/{cell}" for step in ("predict", "score") for cell in CELLS}
    assert (
        planned(project, "suites", "--configfile", "suites.yaml") == {"longbench-data", "suite-table/longbench"} | own
    )
