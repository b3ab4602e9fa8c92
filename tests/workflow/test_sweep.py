"""`snakemake sweep`: what is planned, what the tiny run gives, and that a change reruns the cells that it decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdtp.pipeline.sweeps import SWEEP_COLUMNS
from sdtp.pruning.pruner import TokenPruner
from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

pytestmark = pytest.mark.slow

# The cell of one stage at layer 1 with ratio 0.8 belongs to both sweeps.
CELLS = ["1-0.8", "1-0.5", "2-0.8", "2-0.5", "1-2-0.8"]
EVALUATED = {f"sweep-evaluate/{cell}" for cell in CELLS}


@pytest.fixture(scope="module")
def swept(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run in which the sweeps were made as well. Not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("swept") / "sdtp", symlinks=True)
    process = snakemake(folder, "sweep", "--configfile", "tiny.yaml")
    # The unpruned model was evaluated by the run.
    assert job_counts(process.stdout) == {"sweep_train": 1, "sweep_evaluate": 5, "sweep_table": 1}
    return folder


def test_default_plans_the_papers_layers_ratios_and_counts_and_the_cell_they_share_once(tmp_path: Path) -> None:
    output = snakemake(copy_project(tmp_path / "sdtp"), "sweep", "--dry-run").stdout
    assert job_counts(output) == {
        "model": 1,
        "data": 1,
        "test_data": 1,
        "check": 1,
        "reference": 1,
        "evaluate": 1,  # the unpruned model
        "sweep_train": 1,
        "sweep_evaluate": 10 * 3 + 7 - 1,
        "sweep_table": 1,
    }
    assert "--layers 4 7 10 13 16 19 22 --keep-ratio 0.9" in output
    assert output.count("--layers 4 --keep-ratio 0.9") == 1


def test_tables_are_of_the_cells_evaluations(swept: Path) -> None:
    results = swept / "results" / "tiny"
    assert TokenPruner.from_pretrained(results / "sweep" / "pruner").schedule.layers == (1, 2)
    unpruned = {
        row["id"]: row
        for row in map(json.loads, (results / "evaluation" / "unpruned-1.0.jsonl").read_text("utf-8").splitlines())
    }
    assert len(unpruned) == 4
    tables = {
        name: pd.read_csv(results / "tables" / f"stage-{name}.csv", dtype={"layers": str})
        for name in ("position", "count")
    }
    assert all(list(table.columns) == SWEEP_COLUMNS for table in tables.values())
    panels = {
        name: table[(table["task"] == "continuation") & (table["metric"] == "loss")] for name, table in tables.items()
    }
    pruned = {name: panel[panel["method"] == "sdtp"] for name, panel in panels.items()}
    cells = {name: list(zip(rows["layers"], rows["keep_ratio"], strict=True)) for name, rows in pruned.items()}
    assert cells == {"position": [("1", 0.8), ("1", 0.5), ("2", 0.8), ("2", 0.5)], "count": [("1", 0.8), ("1 2", 0.8)]}
    for row in pd.concat(pruned.values()).to_dict("records"):
        name = f"layers-{row['layers'].replace(' ', '-')}-ratio-{row['keep_ratio']}.jsonl"
        rows = map(json.loads, (results / "sweep" / "evaluation" / name).read_text("utf-8").splitlines())
        [own] = [one for one in rows if one["task"] == "continuation"]  # sweep.examples is 1
        assert row["n"] == 1
        assert row["value"] == pytest.approx(own["loss"], abs=1e-12)
        assert row["difference"] == pytest.approx(own["loss"] - unpruned[own["id"]]["loss"], abs=1e-12)
        assert row["compression"] == pytest.approx(own["prompt_tokens"] / own["kept_tokens"])
    speedups = pruned["position"].set_index(["layers", "keep_ratio"])["flop_speedup"]
    # The earlier the stage and the less it keeps, the less is left to compute.
    assert speedups["1", 0.5] > speedups["2", 0.5] > speedups["2", 0.8] > 1
    for name in ("stage-position", "stage-count"):
        for kind in ("svg", "png"):
            assert (results / "figures" / f"{name}.{kind}").stat().st_size > 5000


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"sweep": {"layer_ratios": [0.8, 0.5, 0.3]}}, {"sweep-evaluate/1-0.3", "sweep-evaluate/2-0.3", "sweep-table"}),
    ({"sweep": {"count_ratios": [0.5]}}, {"sweep-evaluate/1-2-0.5", "sweep-table"}),
    ({"sweep": {"examples": 2}}, EVALUATED | {"sweep-table"}),
    (
        {"sweep": {"layers": [1, 2, 3]}},
        EVALUATED | {"sweep-train", "sweep-evaluate/3-0.8", "sweep-evaluate/3-0.5", "sweep-table"},
    ),
    ({"training": {"label_epochs": 3}}, EVALUATED | {"sweep-train", "sweep-table"}),
    ({"saliency": {"reduction": "l2"}}, EVALUATED | {"sweep-train", "sweep-table"}),
    # Scorers that learn from saliency alone know nothing of the steps through the masked model.
    ({"training": {"steps": 5, "weights": {"ce": 0.5, "kl": 0.5}}}, set()),
    ({"saliency": {"shards": 3}}, set()),
    ({"evaluation": {"methods": ["random"]}}, set()),
]


@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_changed_setting_reruns_the_cells_that_it_decides(
    swept: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert planned(swept, "sweep", "--configfile", overlay(tmp_path / "changed.yaml", change)) == jobs


def test_the_run_itself_asks_for_no_sweep(swept: Path) -> None:
    assert planned(swept, "--configfile", overlay(swept / "other.yaml", {"sweep": {"layers": [3]}})) == set()


def test_layer_the_model_does_not_have_is_refused_by_its_key(swept: Path, tmp_path: Path) -> None:
    project = shutil.copytree(swept, tmp_path / "sdtp", symlinks=True)
    config = overlay(project / "deep.yaml", {"sweep": {"layers": [1, 9]}})
    process = snakemake(project, "sweep", "--configfile", config, check=False)
    assert process.returncode == 1
    assert "error: sweep.layers: 9 is no layer to prune at; the model has 4 layers" in process.stdout
    assert "Traceback" not in process.stdout
