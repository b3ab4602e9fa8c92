"""`kill -9` of the train step in any phase, and the same command again: nothing is lost, nothing differs by a bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdtp.pipeline.steps import train
from sdtp.pruning.pruner import TokenPruner
from tests.pipeline.conftest import TRACKING
from tests.pipeline.killed_training import PHASES
from tests.pipeline.saliency_run import index_of, make_run, shard
from tests.pipeline.test_training_steps import TRAIN
from tests.training.several import make_model

mlflow = pytest.importorskip("mlflow")

REPOSITORY = Path(__file__).parents[2]
TRAINING = {"steps": 7, "batch_size": 2, "patience": 9, "evaluate_every": 1, "label_epochs": 2}
SETTINGS = {**TRAIN, "training": {**TRAIN["training"], **TRAINING}}


def arguments(inputs: Path, run: str) -> list[str]:
    """A train step on the model, data and labels of one folder that writes into another."""
    read = ["--model", inputs / "model", "--data", inputs / "data", "--saliency", inputs / "saliency" / "index.json"]
    write = ["--output", f"{run}/pruner", "--history", f"{run}/history.csv", "--metrics", f"{run}/metrics.json"]
    options = ["--settings", json.dumps(SETTINGS), "--code", "c" * 64, "--checkpoints", f"{run}/checkpoints"]
    return [str(part) for part in [*options, *read, *write]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder with the inputs, `whole`, what a training makes of them that nobody kills, and those that were killed.

    All report to one database.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in TRACKING:
            patch.delenv(name, raising=False)
        make_run(folder, make_model(), [20 + number for number in range(5)])
        index_of(folder, [shard(folder, 0), shard(folder, 1)])
        (folder / "whole").mkdir()
        train.main(arguments(folder, str(folder / "whole")))
        patch.setenv("SDTP_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        done = subprocess.run(
            [sys.executable, "-m", "tests.pipeline.killed_training", *arguments(folder, "RUN")],
            cwd=folder, capture_output=True, text=True, check=False,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            },
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PHASES)), ids=list(PHASES))
def test_a_killed_training_goes_on_to_the_same_pruner(
    killed: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    phase, run, whole = list(PHASES)[number], killed / f"phase-{number}", killed / "whole"
    database = f"sqlite:///{killed / 'mlflow.db'}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("SDTP_PARENT_RUN_FILE", raising=False)
    monkeypatch.setenv("SDTP_TRACKING_URI", database)
    assert (run / "phase.log").read_text() == phase
    # What Snakemake does to the outputs of a job that did not end well.
    shutil.rmtree(run / "pruner", ignore_errors=True)
    (run / "history.csv").unlink(missing_ok=True)
    torch.manual_seed(number)  # no state of a generator is of any account
    train.main(arguments(killed, str(run)))

    expected, found = (load_file(folder / "pruner" / "pruner.safetensors") for folder in (whole, run))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (run / "history.csv").read_text() == (whole / "history.csv").read_text()
    assert not list((run / "checkpoints").rglob(".tmp-*"))
    client = mlflow.MlflowClient(tracking_uri=database)
    experiment = client.get_experiment_by_name("sdtp").experiment_id
    second, first = client.search_runs([experiment], f"tags.`sdtp.output` = '{run / 'pruner'}'")
    assert [first.info.status, second.info.status] == ["KILLED", "FINISHED"]
    assert second.data.tags["sdtp.supersedes"] == first.info.run_id
    steps = [point.step for point in client.get_metric_history(second.info.run_id, "train/loss")]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6, 7]  # the curve is whole, each step once
    # The pruners of the checkpoint it went on from and of those it made, the last three; the rest are in the first run.
    before, kept = (
        sorted(entry.path for entry in client.list_artifacts(tracked.info.run_id, "checkpoints"))
        for tracked in (first, second)
    )
    due = [f"checkpoints/step-{step:08d}" for step in (4, 6, 7)]
    assert kept == due[3 - len(kept) :]
    assert {*due} <= {*before, *kept}
    if kept:
        pruner = TokenPruner.from_pretrained(Path(client.download_artifacts(second.info.run_id, kept[-1])))
        (state,) = (run / "checkpoints").iterdir()
        last = load_file(state / "step-00000007" / "state.safetensors")
        assert all(torch.equal(value, last[f"module/{name}"]) for name, value in pruner.scorer.state_dict().items())
