"""Two invocations on one run: Snakemake allows them where their targets share nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sdtp.pipeline.tracking import finish_pipeline, start_pipeline
from tests.workflow import tiny_model
from tests.workflow.project import TINY, copy_project, snakemake

pytestmark = pytest.mark.slow


def test_steps_belong_to_the_invocation_that_called_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = copy_project(tmp_path / "sdtp")
    tiny_model.make(folder / "tiny-model")
    shutil.copy(TINY, folder / "tiny.yaml")
    results = folder / "results" / "tiny"
    start_pipeline(results, {"run": "tiny"}, "sdtp", None)
    snakemake(folder, "results/tiny/model", "--configfile", "tiny.yaml")
    client = MlflowClient(f"sqlite:///{folder / 'results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdtp")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    first, second, step = runs
    assert [run.data.tags["sdtp.step"] for run in runs] == ["pipeline", "pipeline", "model"]
    assert [run.info.status for run in runs] == ["RUNNING", "FINISHED", "FINISHED"]
    assert step.data.tags["mlflow.parentRunId"] == second.info.run_id
    finish_pipeline(results, "FINISHED")
    assert client.get_run(first.info.run_id).info.status == "FINISHED"
    assert [path.name for path in results.glob("*mlflow*")] == ["mlflow-parent.json"]
