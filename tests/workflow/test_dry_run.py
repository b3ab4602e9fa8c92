"""What Snakemake plans in an empty clone, and what it refuses before anything runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.workflow.project import copy_project, job_counts, snakemake

DEFAULT = {
    "model": 1,
    "check": 1,
    "data": 1,
    "test_data": 1,
    "benchmark_text": 1,
    "saliency": 2,
    "saliency_index": 1,
    "train": 1,
    "generate": 3,
    "benchmark": 3,
    "reference": 1,
    "evaluate": 13,  # unpruned, and 4 methods at 3 ratios
    "tables": 1,
    "figures": 1,
    "report": 1,
    "register": 1,
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
    assert f"Checking the 16 steps of run default: {', '.join(DEFAULT)}" in output


def leased(output: str) -> list[tuple[int, str]]:
    """GPUs and name of each job of a dry run that takes any."""
    commands = re.findall(
        r"^Shell command: sdtp lease --gpus (\d+) .*?--log logs/[^/]+/(\S+)\.log ", output, re.MULTILINE
    )
    return [(int(gpus), job) for gpus, job in commands]


@pytest.mark.parametrize("name", ["qwen2-7b", "mistral-7b", "llama2-7b", "bloom-7b"])
def test_paper_jobs_on_eight_gpus(clone: Path, name: str) -> None:
    arguments = ("--dry-run", "--cores", "all", "--resources", "gpu=8", "--configfile", f"config/paper/{name}.yaml")
    # Planning asks no hub: with any other address it would fail.
    output = snakemake(clone, *arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0").stdout
    # Two peers and the oracle too; LastQuery reads no attention with ALiBi.
    evaluations = 16 if name == "bloom-7b" else 19
    assert job_counts(output) == DEFAULT | {"saliency": 8, "evaluate": evaluations}
    jobs = leased(output)
    assert [job for job in jobs if job[0] != 1] == [(8, "train")]
    assert sorted(job for gpus, job in jobs if job.startswith("saliency/")) == [
        f"saliency/{shard}" for shard in range(8)
    ]
    assert len(jobs) == 8 + 1 + 3 + 3 + 1 + evaluations
    assert f"results/{name}/report.html" in output
    assert "results/default" not in output


@pytest.mark.parametrize("gpus", [1, 3, 16])
def test_training_takes_no_more_gpus_than_there_are(clone: Path, gpus: int) -> None:
    arguments = ("--dry-run", "--resources", f"gpu={gpus}", "--configfile", "config/paper/qwen2-7b.yaml")
    assert (min(gpus, 8), "train") in leased(snakemake(clone, *arguments).stdout)


def test_training_on_a_machine_without_gpus_is_one_of_its_jobs(clone: Path) -> None:
    # The default profile lets as many GPU jobs run as there are cores; a job that wanted more would never start.
    arguments = ("--dry-run", "--configfile", "config/paper/qwen2-7b.yaml")
    output = snakemake(clone, *arguments, CUDA_VISIBLE_DEVICES="").stdout
    assert (min(os.cpu_count() or 1, 8), "train") in leased(output)


@pytest.mark.parametrize("name", ["study", "bench"])
def test_overlay_has_a_run_of_its_own(clone: Path, name: str) -> None:
    output = snakemake(clone, "--dry-run", "--configfile", f"config/{name}.yaml").stdout
    # The study: two ratios of five methods, one with a pruner tuned for each, and the unpruned model.
    fewer = {"study": {"evaluate": 11, "tune": 2, "generate": 2, "benchmark": 2}}
    assert job_counts(output) == DEFAULT | fewer.get(name, {})
    assert f"results/{name}/report.html" in output
    assert "results/default" not in output


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("training: {stepz: 3}", "training.stepz = 3: no such key; training has gpus, keep_ratio,"),
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
