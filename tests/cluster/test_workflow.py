"""The tiny run through profiles/slurm on a real Slurm: whole, equal to a local run, jobs with what their rules ask."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from tests.cluster import slurm_cluster
from tests.cluster.tiny_run import CONFIGURED, call, hashes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason="not installed: snakemake-executor-plugin-slurm (pip install -e '.[slurm]')",
    ),
]

# Sums depend on the number of threads that make them: those of the local run, on two cores. And nobody waits for a file
# that does not show here.
OPTIONS = [
    *("--set-threads", "saliency=1", "train=2", "generate=1", "benchmark=2", "reference=1", "evaluate=1"),
    *("--slurm-partition-config", "partitions.yaml", "--slurm-init-seconds-before-status-checks", "2"),
    *("--latency-wait", "5"),
]
# Rules that compute on a GPU, and what the profile gives them: minutes and MB.
GPU_JOBS = {
    "saliency": (240, 64_000),
    "train": (1440, 96_000),
    "generate": (240, 64_000),
    "benchmark": (240, 96_000),
    "reference": (240, 64_000),
    "evaluate": (240, 64_000),
}


@dataclass(frozen=True)
class Task:
    """A program that Slurm ran: when, as which job, and with which devices in CUDA_VISIBLE_DEVICES."""

    job: str
    node: str
    devices: frozenset[str]
    started: float
    ended: float


def submit(cluster: Path, project: Path, *arguments: str) -> str:
    """What it says with the Slurm profile."""
    profile = ["--workflow-profile", "profiles/slurm"]
    return call(project, *profile, *arguments, *CONFIGURED, *OPTIONS, environment=slurm_cluster.environment(cluster))


@pytest.fixture(scope="module")
def submitted(cluster: Path, local: Path) -> tuple[Path, str]:
    """A project folder in which Slurm made it, and what Snakemake said."""
    folder = local.with_name("submitted")
    shutil.copytree(local.with_name("untouched"), folder)
    return folder, submit(cluster, folder)


@pytest.fixture(scope="module")
def jobs(cluster: Path, submitted: tuple[Path, str]) -> dict[str, list[dict[str, str]]]:
    """What Slurm knows of the run's jobs, by their rules."""
    found = defaultdict(list)
    for number in re.findall(r"SLURM jobid (\d+)", submitted[1]):
        line = slurm_cluster.call(cluster, "scontrol", "show", "job", "--oneliner", number)
        job = dict(pair.partition("=")[::2] for pair in line.split())
        rule = re.fullmatch(r"rule_(.+?)(_wildcards_.*)?", job["Comment"])
        assert rule is not None, job
        found[rule[1]].append(job)
    return found


def megabytes(shown: str) -> float:
    """Of what Slurm shows as 16000M or 62.50G."""
    return float(shown[:-1]) * {"M": 1, "G": 1024}[shown[-1]]


def tasks(cluster: Path) -> list[Task]:
    """What each job's programs were given, as Slurm's own prolog and epilog wrote it down."""
    begun: dict[tuple[str, ...], tuple[float, str]] = {}
    found = []
    for line in (cluster / "tasks.txt").read_text().splitlines():
        at, event, job, step, node, rank, devices = line.split()
        if event == "starts":
            begun[job, step, node, rank] = float(at), devices
        else:
            since, given = begun.pop((job, step, node, rank))
            assert given == devices
            if step != "batch":  # the program itself, and not the script that calls it
                found.append(Task(job, node, frozenset(given.split(",")) - {"-"}, since, float(at)))
    return found


def test_the_run_completes_and_every_job_was_slurms(submitted: tuple[Path, str], local: Path) -> None:
    folder, output = submitted
    assert re.search(r"(\d+) of \1 steps \(100%\) done", output), output[-3000:]
    jobs = re.search(r"^total +(\d+)", output, re.MULTILINE)
    assert jobs is not None
    # All but the target itself.
    assert len(re.findall(r"SLURM jobid \d+", output)) == int(jobs[1]) - 1 > len(GPU_JOBS) + 6
    assert (folder / "results" / "tiny" / "report.html").stat().st_size > 10_000


def test_results_are_those_of_a_local_run(submitted: tuple[Path, str], local: Path) -> None:
    expected, found = (hashes(folder / "results" / "tiny") for folder in (local, submitted[0]))
    assert len(expected) > 25
    assert {"pruner/pruner.safetensors", "evaluation/sdtp-0.8.jsonl", "tables/quality.csv"} <= set(expected)
    assert found == expected


def test_jobs_ask_for_what_their_rules_say(jobs: dict[str, list[dict[str, str]]]) -> None:
    threads = {"train": "2", "benchmark": "2"}
    for rule, known in jobs.items():
        minutes, memory = GPU_JOBS.get(rule, (240, 16_000))
        for job in known:
            assert job["JobState"] == "COMPLETED"
            assert job["Partition"] == ("gpu" if rule in GPU_JOBS else "cpu"), rule
            assert job.get("TresPerJob") == ("gres:gpu:1" if rule in GPU_JOBS else None), rule
            assert job["TimeLimit"] == {240: "04:00:00", 1440: "1-00:00:00"}[minutes], rule
            assert megabytes(job["MinMemoryNode"]) == pytest.approx(memory, rel=1e-3), rule
            assert job["CPUs/Task"] == threads.get(rule, "1"), rule
            assert job["NumNodes"] == "1"
            # Nothing else on the node while timing.
            assert job["OverSubscribe"] == ("NO" if rule == "benchmark" else "OK"), rule
    assert set(jobs) > set(GPU_JOBS)


@pytest.mark.usefixtures("submitted")
def test_gpu_jobs_run_at_once_on_devices_of_their_own(cluster: Path, jobs: dict[str, list[dict[str, str]]]) -> None:
    of_the_run = {job["JobId"] for known in jobs.values() for job in known}
    found = [task for task in tasks(cluster) if task.job in of_the_run]
    assert {task.job for task in found} == of_the_run
    with_gpu = {job["JobId"] for rule in GPU_JOBS for job in jobs[rule]}
    for task in found:
        assert len(task.devices) == (1 if task.job in with_gpu else 0)
    together = [
        (one, other)
        for one, other in combinations([task for task in found if task.devices], 2)
        if one.node == other.node and one.started < other.ended and other.started < one.ended
    ]
    assert together
    for one, other in together:
        assert not one.devices & other.devices
    assert {device for task in found for device in task.devices} == {"0", "1"}
    # The two shards of stage 1 were two of them.
    shards = {job["JobId"] for job in jobs["saliency"]}
    assert len(shards) == 2
    timings = [task for task in found if task.job in {job["JobId"] for job in jobs["benchmark"]}]
    for timing in timings:
        assert not [
            task for task in found if task is not timing and task.started < timing.ended and timing.started < task.ended
        ]


def test_training_is_spread_over_two_nodes(cluster: Path, submitted: tuple[Path, str], tmp_path: Path) -> None:
    folder = shutil.copytree(submitted[0], tmp_path / "sdtp", symlinks=True)
    nodes = [
        *("train:gpu=2", "train:nodes=2", "train:tasks=2", "train:tasks_per_gpu=0", "train:slurm_partition=both"),
        "train:mpi='srun --nodes=2 --ntasks=2 --cpus-per-task=1 --kill-on-bad-exit=1'",
    ]
    target = "results/tiny/pruner"
    output = submit(cluster, folder, target, "--forcerun", "train", "--set-resources", *nodes)
    [number] = re.findall(r"SLURM jobid (\d+)", output)
    line = slurm_cluster.call(cluster, "scontrol", "show", "job", "--oneliner", number)
    job = dict(pair.partition("=")[::2] for pair in line.split())
    assert (job["JobState"], job["NumNodes"], job["NumTasks"]) == ("COMPLETED", "2", "2")
    assert job["TresPerJob"] == "gres:gpu:2"
    assert {task.node for task in tasks(cluster) if task.job == number} == {"n1", "n2"}
    subprocess.run([sys.executable, "-c", _SAME, folder / target, submitted[0] / target], check=True, timeout=120)


_SAME = """
import sys
import torch
from safetensors.torch import load_file
one, other = (load_file(f"{folder}/pruner.safetensors") for folder in sys.argv[1:])
assert one.keys() == other.keys()
for name, value in one.items():
    torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)
"""
