"""The profiles say what Snakemake takes, and the default one limits GPU jobs by the GPUs there are (case D1)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from snakemake.profiles import ProfileConfigFileParser

from sdtp.pipeline.devices import visible_gpus
from tests.workflow.project import ROOT


def rules() -> dict[str, str]:
    """The text of each rule in workflow/rules, whatever the configuration; a `use rule` has that of its base before."""
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    heads = list(re.finditer(r"^ *(?:rule (\w+):|use rule (\w+) (?:from \w+ )?as (\w+))", text, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    found: dict[str, str] = {}
    based: dict[str, tuple[str, str]] = {}
    for head, end in zip(heads, ends, strict=True):
        own, base, other = head.groups()
        body = text[head.end() : end]
        if own:
            found[own] = body
        else:
            based[other] = base, body
    return found | {name: found[base] + body for name, (base, body) in based.items()}


def profile(name: str) -> dict[str, Any]:
    """A profile as Snakemake reads it."""
    with (ROOT / "profiles" / name / "config.yaml").open(encoding="utf-8") as file:
        return dict(ProfileConfigFileParser().parse(file))


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver lists two GPUs, one of them with a part, and both with names that say GPU again."""
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\n"
        "if [ $1 = -L ]; then echo 'GPU 0: RTX 4090 Laptop GPU (UUID: GPU-a)'\n"
        "echo '  MIG 1g.10gb Device 0: (UUID: MIG-c)'; echo 'GPU 1: RTX 4090 Laptop GPU (UUID: GPU-b)'\n"
        "else echo '0, GPU-a'; echo '1, GPU-b'; fi\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_gpu_jobs_are_limited_by_the_gpus_there_are() -> None:
    assert profile("default")["resources"] == ["gpu=2", "timing=1"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("mask", "gpus"), [("1", 1), ("GPU-a,GPU-b", 2), ("1, 1", 1), ("", 0), (" ", 0), ("-1", 0)])
def test_mask_from_outside_is_respected(monkeypatch: pytest.MonkeyPatch, mask: str, gpus: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert profile("default")["resources"] == [f"gpu={gpus or os.cpu_count()}", "timing=1"]
    assert len(visible_gpus()) == gpus


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
    named = {re.split("[=:]", entry)[0] for key in ("set-threads", "set-resources") for entry in profile(name)[key]}
    assert {"train", "variant_train"} <= named <= rules().keys()


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_cluster_profiles_say_what_every_rule_on_a_gpu_needs(name: str) -> None:
    on_gpu = {rule for rule, body in rules().items() if re.search(r"^ +gpu=(?!0,)", body, re.MULTILINE)}
    timed = {rule for rule, body in rules().items() if re.search(r"^ +timing=1,", body, re.MULTILINE)}
    assert {"train", "paper_train", "variant_evaluate", "throughput", "kvpress", "llmlingua"} <= on_gpu
    assert {"benchmark", "time_compression", "kvpress_time"} <= timed <= on_gpu
    given = profile(name)
    threads = dict(entry.split("=") for entry in given["set-threads"])
    memory = {entry.split(":")[0] for entry in given["set-resources"] if ":mem_mb=" in entry}
    assert threads.keys() == memory == on_gpu
    assert {threads[rule] for rule in timed} == {"16"}
    if name == "slurm":
        alone = {entry.split(":")[0] for entry in given["set-resources"] if "--exclusive" in entry}
        assert alone == timed


def test_slurm_keeps_the_gpus_of_a_job_on_one_node() -> None:
    assert "nodes=1" in profile("slurm")["default-resources"]


def test_kubernetes_is_told_whose_gpus_and_is_given_limits() -> None:
    # Without the first the plugin refuses a job; without the second Kubernetes refuses a GPU.
    assert {"gpu_manufacturer='nvidia'", "scale=0"} <= set(profile("kubernetes")["default-resources"])


@pytest.mark.parametrize("name", ["default", "slurm", "kubernetes"])
def test_what_a_killed_run_left_is_made_again(name: str) -> None:
    assert profile(name)["rerun-incomplete"] == "True"
