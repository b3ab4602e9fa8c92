"""What is measured of leased GPUs, by a nvidia-smi that answers as the real one does, of a machine of three GPUs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtp.pipeline import operations
from sdtp.pipeline.gpu_meter import MOST_SAMPLES, GpuMeter, leased
from sdtp.pipeline.step import step
from sdtp.pipeline.tracking import start_pipeline
from tests.pipeline.conftest import as_in_the_workflow

# Asked for names it lists all; else it gives the next of its answers, says in `told` that it gave the last, and from
# then on nothing.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *index,uuid*) printf '0, GPU-aaaa\\n1, GPU-bbbb\\n2, GPU-cccc\\n'; exit;;
esac
cd {folder}
echo "$*" >> asked
n=$(wc -l < asked)
[ $n -gt {looks} ] || cat answer-$n
[ $n -ne {looks} ] || echo done > told
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes its nvidia-smi, which gives `answers`, one a look; gives the folder of what it was asked and told."""

    def make(*answers: str) -> Path:
        folder = tmp_path / "machine"
        folder.mkdir()
        os.mkfifo(folder / "told")
        for number, answer in enumerate(answers, 1):
            (folder / f"answer-{number}").write_text(answer)
        program = folder / "nvidia-smi"
        program.write_text(NVIDIA_SMI.format(folder=folder, looks=len(answers)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder

    return make


@pytest.mark.parametrize(
    ("mask", "gpus"),
    [
        (None, []),  # nothing leased: every GPU could be seen, and none is its own
        ("", []),
        ("GPU-cccc,GPU-aaaa", ["GPU-cccc", "GPU-aaaa"]),  # of `sdtp lease`
        ("1", ["GPU-bbbb"]),  # of Slurm
        ("MIG-1", []),
        ("9", []),
    ],
)
def test_leased_are_those_that_the_variable_names(
    mask: str | None, gpus: list[str], machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert leased() == gpus


def test_samples_become_curves_of_the_leased_gpus(machine: Callable[..., Path]) -> None:
    folder = machine(
        "GPU-cccc, 10, 1000, 100.5\nGPU-aaaa, 40, 2000, [N/A]\nGPU-bbbb, 99, 9999, 700\n",  # the last of somebody else
        "Unable to determine the device handle for GPU0000:01:00.0: Unknown Error\n",
        "GPU-cccc, 30, 3000, 200.5\n",
        "GPU-cccc, 20, 2000, 300.5\n",
    )
    meter = GpuMeter(["GPU-cccc", "GPU-aaaa"], seconds=0)
    before = operations.now()
    with meter.running():
        assert (folder / "told").read_text() == "done\n"
    points = list(meter.points())
    assert all(before <= at <= operations.now() for _, _, at, _ in points)
    assert [(name, value, at) for name, value, _, at in points] == [
        ("gpu/0/utilization_percent", 10.0, 0),
        ("gpu/0/utilization_percent", 30.0, 1),
        ("gpu/0/utilization_percent", 20.0, 2),
        ("gpu/0/utilization_percent_mean", 20.0, 0),
        ("gpu/0/memory_bytes", 1000.0 * 2**20, 0),
        ("gpu/0/memory_bytes", 3000.0 * 2**20, 1),
        ("gpu/0/memory_bytes", 2000.0 * 2**20, 2),
        ("gpu/0/memory_bytes_max", 3000.0 * 2**20, 0),
        ("gpu/0/power_watts", 100.5, 0),
        ("gpu/0/power_watts", 200.5, 1),
        ("gpu/0/power_watts", 300.5, 2),
        ("gpu/0/power_watts_mean", 200.5, 0),
        ("gpu/1/utilization_percent", 40.0, 0),
        ("gpu/1/utilization_percent_mean", 40.0, 0),
        ("gpu/1/memory_bytes", 2000.0 * 2**20, 0),
        ("gpu/1/memory_bytes_max", 2000.0 * 2**20, 0),
    ]
    asked = (folder / "asked").read_text().splitlines()
    assert all("--id=GPU-cccc,GPU-aaaa " in line for line in asked)


def test_a_long_step_has_no_more_points(machine: Callable[..., Path]) -> None:
    count = 2 * MOST_SAMPLES + 1
    folder = machine("".join(f"GPU-aaaa, {number}, 1, 1\n" for number in range(count)))
    meter = GpuMeter(["GPU-aaaa"])
    with meter.running():
        (folder / "told").read_text()
    curve = [value for name, value, _, _ in meter.points() if name == "gpu/0/utilization_percent"]
    assert curve == list(range(0, count, 3))
    [mean] = [value for name, value, _, _ in meter.points() if name == "gpu/0/utilization_percent_mean"]
    assert mean == (count - 1) / 2  # of all of them
    assert len((folder / "asked").read_text().splitlines()) == 1  # ten seconds are not over


def test_without_gpus_nothing_is_started(machine: Callable[..., Path]) -> None:
    folder = machine()
    meter = GpuMeter([])
    with meter.running():
        pass
    assert list(meter.points()) == []
    assert not (folder / "asked").exists()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("program", ["#!/bin/sh\nexit 9\n", "#!/nowhere\n"])
def test_what_cannot_be_measured_costs_nothing(program: str, machine: Callable[..., Path]) -> None:
    folder = machine()
    (folder / "nvidia-smi").write_text(program)
    meter = GpuMeter(["GPU-aaaa"])
    with meter.running():
        pass
    assert list(meter.points()) == []


def test_a_step_is_told_of_its_own_gpus(
    machine: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder = machine("GPU-bbbb, 50, 100, 300\nGPU-aaaa, 1, 1, 1\n")
    run_folder = tmp_path / "results" / "default"
    as_in_the_workflow(monkeypatch, run_folder)
    start_pipeline(run_folder, {"run": "default"}, "sdtp", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb")
    args = argparse.Namespace(settings="{}", metrics=run_folder / "metrics" / "train.json")
    with step("train", args, outputs=[run_folder / "out"]) as log:
        (folder / "told").read_text()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'results' / 'mlflow.db'}")
    found = client.get_run(log.run_id).data
    assert {key: value for key, value in found.metrics.items() if key.startswith("gpu/")} == {
        "gpu/0/utilization_percent": 50.0,
        "gpu/0/utilization_percent_mean": 50.0,
        "gpu/0/memory_bytes": 100.0 * 2**20,
        "gpu/0/memory_bytes_max": 100.0 * 2**20,
        "gpu/0/power_watts": 300.0,
        "gpu/0/power_watts_mean": 300.0,
    }
    assert found.tags["sdtp.gpus"] == "GPU-bbbb"
    # A step that takes times looks at none, nor does one that nobody tracks.
    (folder / "asked").unlink()
    with step("benchmark", args, outputs=[run_folder / "out"], times=True):
        pass
    assert not (folder / "asked").exists()
    for name in ("SDTP_PARENT_RUN_FILE", "MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with step("train", args, outputs=[run_folder / "out"]):
        pass
    assert not (folder / "asked").exists()
