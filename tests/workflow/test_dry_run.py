"""What Snakemake plans in an empty clone, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.project import copy_project, job_counts, snakemake

DEFAULT = {
    "model": 1,
    "check": 1,
    "data": 1,
    "saliency": 2,
    "saliency_index": 1,
    "train": 1,
    "generate": 3,
    "benchmark": 3,
    "evaluate": 13,  # unpruned, and 4 methods at 3 ratios
    "tables": 1,
    "figures": 1,
    "report": 1,
}
SOURCE = "{kind: hub, ref: a/b, revision: null, sha256: null}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("clone") / "sdtp")


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_empty_clone_plans_every_step(clone: Path, snakefile: str) -> None:
    output = snakemake(clone, "--dry-run", "--snakefile", snakefile).stdout
    assert job_counts(output) == DEFAULT
    assert f"Checking the 12 steps of run default: {', '.join(DEFAULT)}" in output


def test_qwen2_jobs_on_eight_gpus(clone: Path) -> None:
    arguments = ("--dry-run", "--cores", "all", "--resources", "gpu=8", "--configfile", "config/paper/qwen2-7b.yaml")
    output = snakemake(clone, *arguments).stdout
    assert job_counts(output) == DEFAULT | {"saliency": 8}
    assert "results/qwen2-7b/report.html" in output
    assert "results/default" not in output


@pytest.mark.parametrize("name", ["study", "bench"])
def test_overlay_has_a_run_of_its_own(clone: Path, name: str) -> None:
    output = snakemake(clone, "--dry-run", "--configfile", f"config/{name}.yaml").stdout
    assert job_counts(output) == DEFAULT
    assert f"results/{name}/report.html" in output
    assert "results/default" not in output


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("training: {stepz: 3}", "training.stepz = 3: no such key; training has keep_ratio, label_epochs,"),
        ("trainig: {steps: 3}", 'trainig = {"steps": 3}: no such key; the config has run, seed, model,'),
        ("training: {steps: many}", 'training.steps = "many": must be a whole number ≥ 1'),
        ("pruning: {start: 0}", "pruning.start = 0: must be a whole number ≥ 1"),
        (f"model: {{source: {SOURCE.replace('hub', 'jsonl')}}}", 'model.source.kind = "jsonl": must be one of hub,'),
        ("model: {source: {kind: hub, ref: a/b}}", "also needs revision, sha256; a file given on top of the default"),
        ("tracking: {uri: 'file:./mlruns'}", 'tracking.uri = "file:./mlruns": must be'),
    ],
)
def test_wrong_configuration_is_refused_in_one_line(clone: Path, tmp_path: Path, overlay: str, message: str) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(overlay, encoding="utf-8")
    process = snakemake(clone, "--configfile", str(path), check=False)
    assert process.returncode == 1
    assert message in process.stdout
    assert "Traceback" not in process.stdout
    assert not (clone / "results").exists()


def test_tracking_in_a_folder_is_refused_from_the_environment_too(clone: Path) -> None:
    process = snakemake(clone, check=False, MLFLOW_TRACKING_URI="file:./mlruns")
    assert process.returncode == 1
    assert "'file:./mlruns' is a folder, which MLflow no longer writes to" in process.stdout


def test_snakemake_finds_nothing_to_criticise(clone: Path) -> None:
    process = snakemake(clone, "--lint", check=False)
    assert "Congratulations, your workflow is in a good condition!" in process.stdout
