"""The train step as a Slurm step of several tasks: on one node, on two, and as the workflow's profile submits it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster import slurm_cluster
from tests.pipeline.test_launch import LAUNCHER, TWO, arguments, inputs  # noqa: F401  (a fixture)
from tests.workflow.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

CALL = "import sys; from sdtp.cli import main; sys.exit(main())"


def srun(
    cluster: Path, folder: Path, run: Path, *options: str, program: str = CALL, settings: dict = TWO, gpus: int = 1
) -> subprocess.CompletedProcess[str]:
    """`sdtp train` as each task of a step of a job of its own; a `sitecustomize.py` beside `run` is read by each."""
    run.mkdir()
    environment = slurm_cluster.environment(cluster)
    environment = {name: value for name, value in environment.items() if not name.startswith(("MLFLOW", "SDTP"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{run.parent}:{ROOT / 'src'}"}
    task = [sys.executable, "-c", program, "--log", str(run / "train.log"), "train", "--processes", str(gpus)]
    return subprocess.run(
        ["srun", "--partition=both", "--mem=1000", "--kill-on-bad-exit=1", *options,
         *task, *arguments(folder, run, settings)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What one process writes, without Slurm."""
    run = tmp_path_factory.mktemp("alone")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "SDTP"))}
    subprocess.run(
        [sys.executable, "-c", CALL, "train", *arguments(inputs, run)],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")},
        check=True, timeout=300,
    )  # fmt: skip
    return run


@pytest.mark.parametrize(
    ("tasks", "options", "program", "gpus"),
    [
        (2, ["--nodes=1", "--ntasks=2"], CALL, 1),
        (2, ["--nodes=2", "--ntasks=2", "--gpus=2"], CALL, 2),
        # As where each of the two nodes has two GPUs.
        (4, ["--nodes=2", "--ntasks=2", "--gpus=4"], LAUNCHER, 4),
    ],
    ids=["one node", "two nodes", "two nodes of two processes"],
)
def test_tasks_write_one_pruner_that_is_one_processs(
    cluster: Path,
    inputs: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
    tasks: int,
    options: list[str],
    program: str,
    gpus: int,
) -> None:
    counted = tmp_path / "worlds"
    counted.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "if 'LOCAL_RANK' in os.environ:\n"
        f"    place = pathlib.Path({str(counted)!r}, os.environ['RANK'])\n"
        "    place.write_text(os.environ['WORLD_SIZE'] + ' ' + os.environ['SLURMD_NODENAME'])\n"
    )  # fmt: skip
    found = srun(cluster, inputs, tmp_path / "run", *options, program=program, gpus=gpus)
    assert found.returncode == 0, found.stderr[-3000:]
    expected, made = (load_file(run / "pruner" / "pruner.safetensors") for run in (alone, tmp_path / "run"))
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-5)
    ranks = {int(path.name): path.read_text().split() for path in counted.iterdir()}
    assert sorted(ranks) == list(range(tasks))
    assert {world for world, _ in ranks.values()} == {str(tasks)}
    # Ranks follow the tasks, and those the nodes.
    nodes = ["n1", "n2"] if "--nodes=2" in options else ["n1"]
    assert [ranks[rank][1] for rank in range(tasks)] == [node for node in nodes for _ in range(tasks // len(nodes))]
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert sum(line.startswith("sdtp ") for line in log) == 1  # the main process's; the others say nothing
    assert sum("train: done in" in line for line in log) == 2  # the main process, and what launched it


def test_a_failure_is_told_once_and_ends_all_tasks(cluster: Path, inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = {**TWO, "pruning": {**TWO["pruning"], "start": 2}}
    found = srun(cluster, inputs, tmp_path / "run", "--nodes=2", "--ntasks=2", settings=settings)
    # srun returns the highest status of its tasks: 128 + SIGTERM where it ended the second before that had exited.
    assert found.returncode in (1, 128 + signal.SIGTERM), found.stderr[-3000:]
    assert found.stderr.count("layers is [1, 3], but [2] is needed here") == 1
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run" / "pruner").exists()


def test_a_task_that_is_killed_ends_the_others(cluster: Path, inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )  # fmt: skip
    found = srun(cluster, inputs, tmp_path / "run", "--nodes=2", "--ntasks=2")
    assert found.returncode != 0
    assert "error: process 1 of 2 was ended by SIGKILL" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run" / "pruner").exists()
