"""The profiles say what Snakemake takes, and the default one limits GPU jobs by the GPUs there are (case D1)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from snakemake.profiles import ProfileConfigFileParser

from tests.workflow.project import ROOT


def profile(name: str) -> dict[str, Any]:
    """A profile as Snakemake reads it."""
    with (ROOT / "profiles" / name / "config.yaml").open(encoding="utf-8") as file:
        return dict(ProfileConfigFileParser().parse(file))


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver lists two GPUs."""
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\necho 'GPU 1: H100 (UUID: GPU-b)'\n", encoding="utf-8"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_gpu_jobs_are_limited_by_the_gpus_there_are() -> None:
    assert profile("default")["resources"] == ["gpu=2", "timing=1"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("mask", "limit"), [("1", "gpu=1"), ("GPU-a,GPU-b", "gpu=2"), ("", f"gpu={os.cpu_count()}")])
def test_mask_from_outside_is_respected(monkeypatch: pytest.MonkeyPatch, mask: str, limit: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert profile("default")["resources"] == [limit, "timing=1"]


def test_without_gpus_the_cores_are_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert profile("default")["resources"] == [f"gpu={os.cpu_count()}", "timing=1"]


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_cluster_profiles_set_the_threads_of_the_steps_that_take_all_cores(name: str) -> None:
    threads = profile(name)["set-threads"]
    assert isinstance(threads, list)
    assert {"train=16", "benchmark=16"} <= set(threads)


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_cluster_profiles_name_rules_that_exist(name: str) -> None:
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rules = {one or other for one, other in re.findall(r"^ *(?:rule (\w+):|use rule .* as (\w+))", text, re.MULTILINE)}
    named = {re.split("[=:]", entry)[0] for key in ("set-threads", "set-resources") for entry in profile(name)[key]}
    assert {"train", "variant_train"} <= named <= rules


def test_slurm_keeps_the_gpus_of_a_job_on_one_node() -> None:
    assert "nodes=1" in profile("slurm")["default-resources"]


def test_kubernetes_is_told_whose_gpus_and_is_given_limits() -> None:
    # Without the first the plugin refuses a job; without the second Kubernetes refuses a GPU.
    assert {"gpu_manufacturer='nvidia'", "scale=0"} <= set(profile("kubernetes")["default-resources"])


@pytest.mark.parametrize("name", ["default", "slurm", "kubernetes"])
def test_what_a_killed_run_left_is_made_again(name: str) -> None:
    assert profile(name)["rerun-incomplete"] == "True"
