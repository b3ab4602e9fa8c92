"""Runs that a store could not take wait on disk, and arrive later: whole, and once."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdtp.errors import UserError
from sdtp.pipeline import operations
from sdtp.pipeline import spool as spool_module
from sdtp.pipeline.mlflow_store import without_password
from sdtp.pipeline.spool import Entry, claimed, damaged, waiting, written
from sdtp.pipeline.step import step
from sdtp.pipeline.steps import track
from sdtp.pipeline.tracking import finish_pipeline, start_pipeline
from tests.pipeline.conftest import as_in_the_workflow
from tests.pipeline.mlflow_server import LossyProxy, Server

mlflow = pytest.importorskip("mlflow")

PATIENCE = 400.0
CONFIG = {"run": "default", "seed": 0}

# A step that has metrics of its own, and says when it is in its block and when it is done with all but the end.
STEP = """
import argparse, sys
from pathlib import Path
from sdtp.pipeline.step import step
output, points = Path(sys.argv[1]), int(sys.argv[2])
with step("train", argparse.Namespace(settings='{"seed":0}', metrics=Path(f"{output}.json")), outputs=[output]) as log:
    print("inside", flush=True)
    sys.stdin.readline()
    for at in range(points):
        log.metric("loss", 1 / (at + 1), step=at)
    output.write_text("whole")
    log.artifact(output, "made")
    log.dataset("train", output, "ab" * 32)
    print("told", flush=True)
    sys.stdin.readline()
"""


def arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(settings='{"seed":0}', metrics=folder / "metrics.json")


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder, and the environment that the workflow gives its steps; nothing is opened."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    as_in_the_workflow(monkeypatch, tmp_path / "results" / "default")
    return tmp_path / "results"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path)
    yield one
    one.stop()


@pytest.fixture
def process(python_process: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    return functools.partial(python_process, STEP)


def says(one: subprocess.Popen[str], word: str) -> None:
    assert one.stdout is not None
    assert one.stdout.readline() == f"{word}\n", one.communicate()


def goes_on(one: subprocess.Popen[str]) -> None:
    assert one.stdin is not None
    one.stdin.write("\n")
    one.stdin.flush()


def ends(one: subprocess.Popen[str]) -> str:
    """Lets a step go on to its end, which must be a good one; what it complained of."""
    _, complaints = one.communicate("\n\n", timeout=PATIENCE)
    assert one.returncode == 0, complaints
    return complaints


def test_what_waits_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    opening = {"id": "b", "started": 2, "parent": "a", "label": "train"}
    told = [
        operations.metrics([("loss", 0.1, 1, 0)]),
        operations.text("x.txt", "line\u2028separator\r\nand more"),
        operations.artifact(tmp_path / "folder", "made"),
    ]
    with written(tmp_path / "spool", opening) as entry:
        for operation in told:
            entry.append(operation)
        with claimed(entry.folder) as other:
            assert other is None  # its writer lives
    (tmp_path / "folder" / "a").write_text("changed since")
    with written(tmp_path / "spool", {**opening, "id": "a", "started": 1}):
        pass
    assert [folder.name for folder in waiting(tmp_path / "spool")] == ["a", "b"]
    with claimed(tmp_path / "spool" / "b") as found:
        assert found is not None
        assert found.opening == opening
        *first, last = found.operations()
        assert first == told[:2]
        assert (Path(last["path"]) / "a").read_text() == "a"
        assert Path(last["path"]).name == "folder"
        found.discard()
    assert [folder.name for folder in waiting(tmp_path / "spool")] == ["a"]
    with claimed(tmp_path / "spool" / "b") as gone:
        assert gone is None


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    with written(tmp_path, {"id": "a", "started": 1}) as entry:
        entry.append(operations.tags({"one": "1"}))
        with open(entry.folder / "operations.jsonl", "a") as file:
            file.write('{"kind": "tags", "val')
    with claimed(tmp_path / "a") as found:
        assert found is not None
        found.append(operations.tags({"two": "2"}))
        assert [one["values"] for one in found.operations()] == [{"one": "1"}, {"two": "2"}]


@pytest.mark.slow
def test_a_whole_invocation_arrives_later(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store is unusable from first to last: parent, two runs of one step, what Snakemake measured, the report."""
    database = results / "mlflow.db"
    results.mkdir()
    database.write_bytes(b"not a database " * 100)
    folder = results / "default"
    start_pipeline(folder, CONFIG, "sdtp", None)
    for tau in (0.5, 0.25):
        args, wildcards = arguments(folder / "metrics"), {"keep_ratio": 0.8}
        with step("train", args, outputs=[folder / "pruner"], wildcards=wildcards) as log:
            assert log.run_id == ""
            for at in range(2500):
                log.metric("loss", tau / (at + 1), step=at)
            log.metric("tau", tau)
            (folder / "pruner").write_text(str(tau))
            log.artifact(folder / "pruner")
    resources = folder / "resources" / "metrics.tsv"
    resources.parent.mkdir()
    resources.write_text("s\th:m:s\tmax_rss\n2.5\t0:00:02\t-\n")
    (folder / "report.html").write_text("<html>")
    finish_pipeline(folder, "FINISHED")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"0 of 3 runs of .*mlflow-spool are uploaded.*file is not a database"):
        track.main(["sync"])
    assert len(waiting(results / "mlflow-spool")) == 3
    database.unlink()
    track.main(["sync"])
    assert os.listdir(results / "mlflow-spool") == []
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    second, first, parent = client.search_runs([client.get_experiment_by_name("sdtp").experiment_id])
    assert [run.info.run_name for run in (parent, first, second)] == ["pipeline default", *["train keep_ratio=0.8"] * 2]
    assert {run.info.status for run in (parent, first, second)} == {"FINISHED"}
    assert parent.info.start_time <= first.info.start_time <= first.info.end_time <= second.info.start_time
    for run, tau in ((first, 0.5), (second, 0.25)):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["tau"] == tau
        assert run.data.params == {"seed": "0"}
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(at, tau / (at + 1)) for at in range(2500)]
        assert Path(client.download_artifacts(run.info.run_id, "pruner")).read_text() == str(tau)
    assert second.data.tags["sdtp.supersedes"] == first.info.run_id
    assert first.data.tags["sdtp.superseded_by"] == second.info.run_id
    assert second.data.metrics["snakemake/s"] == 2.5
    assert "snakemake/max_rss" not in second.data.metrics
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id)} == {"config.yaml", "report.html"}
    with caplog.at_level(logging.INFO, "sdtp"):
        track.main(["sync"])
    assert "nothing waits" in caplog.records[-1].getMessage()


@pytest.mark.slow
def test_an_upload_that_was_cut_short_repeats_nothing(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is sent twice: the first time no run is taken off the disk."""
    database = results / "mlflow.db"
    results.mkdir()
    database.write_bytes(b"not a database " * 100)
    folder = results / "default"
    start_pipeline(folder, CONFIG, "sdtp", None)
    with step("train", arguments(folder), outputs=[folder / "pruner"]) as log:
        log.dataset("train", folder, "ab" * 32)
        for at in range(1200):
            log.metric("loss", 1 / (at + 1), step=at)
    database.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("sdtp.pipeline.spool.Entry.discard", lambda self: None)
        track.main(["sync", "--results", str(results)])
    assert len(waiting(results / "mlflow-spool")) == 2
    track.main(["sync", "--results", str(results)])
    assert waiting(results / "mlflow-spool") == []
    # The parent was never closed: as far as anyone knows, it was killed.
    assert sorted(rows(database, "select name, status from runs")) == [
        ("pipeline default", "KILLED"),
        ("train", "FINISHED"),
    ]
    assert rows(database, "select count(*) from metrics where key = 'loss'") == [(1200,)]
    assert rows(database, "select count(*) from metrics where key = 'wall_seconds'") == [(1,)]
    assert rows(database, "select count(*) from inputs") == [(1,)]


def test_an_entry_that_another_process_uploads_meanwhile_is_left_out(
    results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the look at what there is and the look into it."""
    results.mkdir()
    (results / "mlflow.db").write_bytes(b"not a database " * 100)
    spool = results / "mlflow-spool"
    start_pipeline(results / "default", CONFIG, "sdtp", None)
    for name in ("a", "b"):
        with written(spool, {"id": name, "started": 1, "parent": None, "label": name}):
            pass
    listed = spool_module._entries

    def discarding(name: str) -> Callable[[Path], list[Entry]]:
        def entries(folder: Path) -> list[Entry]:
            found = listed(folder)
            for entry in found:
                if entry.folder.name == name:
                    entry.discard()
            return found

        return entries

    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "_entries", discarding("a"))
        assert "a" not in [folder.name for folder in waiting(spool)]
        patch.setattr(spool_module, "_entries", discarding("b"))
        with caplog.at_level(logging.WARNING, "sdtp"):
            finish_pipeline(results / "default", "FINISHED")
    assert "file is not a database" in caplog.records[-1].getMessage()
    [parent] = waiting(spool)
    assert json.loads((parent / "run.json").read_text())["label"] == "pipeline default"


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b'{"id": "a"', b"[]", b"\xff"])
def test_what_of_a_spool_is_damaged(tmp_path: Path, damage: bytes) -> None:
    for name, started in (("a", 1), ("b", 2)):
        with written(tmp_path, {"id": name, "started": started}):
            pass
    (tmp_path / "a" / "run.json").write_bytes(damage)
    assert [folder.name for folder in waiting(tmp_path)] == ["b"]
    [error] = damaged(tmp_path)
    assert str(error).startswith(f"{tmp_path / 'a' / 'run.json'} is damaged (")
    assert str(error).endswith("left where it is: restore the file, or delete its folder")


@pytest.mark.slow
def test_a_damaged_entry_holds_up_no_other(
    results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results.mkdir()
    database = results / "mlflow.db"
    database.write_bytes(b"not a database " * 100)

    def invoke(name: str) -> None:
        start_pipeline(results / name, CONFIG, "sdtp", None)
        finish_pipeline(results / name, "FINISHED")

    invoke("spoiled")
    [spoiled] = waiting(results / "mlflow-spool")
    invoke("whole")
    run = (spoiled / "run.json").read_bytes()
    (spoiled / "run.json").write_bytes(run[:40])
    database.unlink()
    invoke("later")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sdtp"):
            track.main(["sync", "--results", str(results)])
        [warning] = [record.getMessage() for record in caplog.records]
        assert warning.startswith(f"{spoiled / 'run.json'} is damaged (")
        names = "select name, status from runs order by start_time"
        assert rows(database, names) == [("pipeline whole", "FINISHED"), ("pipeline later", "FINISHED")]
    (spoiled / "run.json").write_bytes(run)
    track.main(["sync", "--results", str(results)])
    assert ("pipeline spoiled", "FINISHED") in rows(database, names)


def test_a_spool_that_cannot_be_read_costs_a_warning(
    results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results.mkdir()
    (results / "mlflow.db").write_bytes(b"not a database " * 100)
    start_pipeline(results / "default", CONFIG, "sdtp", None)

    def refuses(folder: Path) -> list[Entry]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(spool_module, "_entries", refuses)
    with caplog.at_level(logging.WARNING, "sdtp"):
        finish_pipeline(results / "default", "FINISHED")
    assert "Permission denied" in caplog.records[-1].getMessage()


# Addresses are quoted in errors, in what Snakemake hands its steps, and in the configuration.
SECRET = "http://user:s3cret@127.0.0.1:9"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["environment", "configuration"])
def test_no_file_holds_the_password_of_a_server_that_is_away(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    config: dict[str, Any] = {**CONFIG, "tracking": {"uri": None, "experiment": "sdtp"}}
    if place == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    else:
        config["tracking"]["uri"] = SECRET
        monkeypatch.setenv("SDTP_TRACKING_URI", SECRET)
    folder, logs = results / "default", tmp_path / "logs"
    logs.mkdir()
    everything = logging.FileHandler(logs / "snakemake.log")
    logging.getLogger().addHandler(everything)
    try:
        start_pipeline(folder, config, "sdtp", config["tracking"]["uri"])
        predictions = folder / "predictions.jsonl"
        predictions.write_text("")
        command = ["--log", logs / "score.log", "--debug", "score", "--predictions", predictions]
        command += ["--output", folder / "scores.jsonl", "--metrics", folder / "metrics" / "score.json"]
        subprocess.run([sys.executable, "-m", "sdtp.cli", *map(str, command)], check=False, capture_output=True)
        # The parent went to the disk, and so the steps did not ask: one that asks for itself.
        (folder / "mlflow-parent.json").rename(folder / "first-parent.json")
        with step("train", arguments(folder / "metrics"), outputs=[folder / "pruner"]):
            pass
        (folder / "first-parent.json").rename(folder / "mlflow-parent.json")
        finish_pipeline(folder, "FINISHED")
    finally:
        logging.getLogger().removeHandler(everything)
        everything.close()
    assert "user:…@127.0.0.1:9" in (logs / "score.log").read_text()
    assert (logs / "snakemake.log").read_text().count("user:…@127.0.0.1:9") >= 2
    assert len(waiting(results / "mlflow-spool")) == 3
    [told] = [path for path in results.rglob("operations.jsonl") if "config.yaml" in path.read_text()]
    logged = yaml.safe_load(json.loads(told.read_text().splitlines()[0])["content"])["tracking"]["uri"]
    assert logged == ("http://user:…@127.0.0.1:9" if place == "configuration" else None)
    files = [path for folder in (results, logs) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("to http://me:pw@host:80/api, failed", "to http://me:…@host:80/api, failed"),
        ("postgresql+psycopg2://:p@w@host/db", "postgresql+psycopg2://:…@host/db"),
        ('{"a":"http://host:80","b":"me@home"}', '{"a":"http://host:80","b":"me@home"}'),
        ("http://me@host:80 and a:b@c", "http://me@host:80 and a:b@c"),
        ("http://a:b@c http://d:e@f", "http://a:…@c http://d:…@f"),
    ],
)
def test_passwords_of_addresses_are_left_out(text: str, without: str) -> None:
    assert without_password(text) == without


@pytest.mark.slow
def test_a_password_is_not_written_down(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTP_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    start_pipeline(results / "default", CONFIG, "sdtp", "http://me:secret@127.0.0.1:9")
    finish_pipeline(results / "default", "FINISHED")
    [folder] = waiting(results / "mlflow-spool")
    assert not any(b"secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    with pytest.raises(UserError, match=r"1 runs of .* were meant for a store with a password: name it with --uri"):
        track.main(["sync", "--results", str(results)])
    track.main(["sync", "--results", str(results), "--uri", f"sqlite:///{results / 'other.db'}"])
    assert rows(results / "other.db", "select status from runs") == [("FINISHED",)]


@pytest.mark.slow
def test_a_server_that_goes_away_costs_nothing(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    process: Callable[..., subprocess.Popen[str]],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    server.start()
    start_pipeline(results / "default", CONFIG, "sdtp", None)
    there_again, stays_away, killed = (process(tmp_path / name, "1500") for name in ("again", "away", "killed"))
    for one in (there_again, stays_away, killed):
        says(one, "inside")
    server.stop()
    for one in (there_again, stays_away, killed):
        goes_on(one)
        says(one, "told")
    assert "tracking failed" in ends(stays_away)
    killed.kill()
    killed.wait(PATIENCE)
    assert len(waiting(results / "mlflow-spool")) == 3
    server.start()
    ends(there_again)  # uploads itself
    assert len(waiting(results / "mlflow-spool")) == 2
    finish_pipeline(results / "default", "FINISHED")  # uploads the others
    assert waiting(results / "mlflow-spool") == []
    track.main(["sync", "--results", str(results)])
    states = [("FINISHED", 3), ("KILLED", 1)]
    assert rows(server.database, "select status, count(*) from runs group by status order by status") == states
    per_run = "select count(*), count(distinct step) from metrics where key = 'loss' group by run_uuid order by 1"
    [cut_short, *whole] = rows(server.database, per_run)
    assert whole == [(1500, 1500)] * 2
    assert 1000 <= cut_short[0] == cut_short[1] < 1500  # what was in its memory went with it
    assert rows(server.database, "select count(*) from inputs") == [(3,)]
    client = mlflow.MlflowClient(server.address)
    [run] = client.search_runs(["1"], f"tags.`sdtp.output` = '{tmp_path / 'away'}'")
    assert Path(client.download_artifacts(run.info.run_id, "made/away")).read_text() == "whole"
    assert run.data.metrics["peak_rss_bytes"] > 1e6
    assert json.loads((tmp_path / "away.json").read_text())["device"] == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["the first of each", "all"])
def test_answers_that_get_lost_make_no_duplicates(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    lost: str,
) -> None:
    """The server does what it is asked, and the answer never arrives: what is asked again is done once."""
    server.start()
    seen: set[str] = set()

    def loses(request: str) -> bool:
        if "search" in request or not request.startswith("POST"):
            return False
        fresh = request not in seen
        seen.add(request)
        return fresh or lost == "all"

    with LossyProxy(server.address, loses) as proxy:
        mlflow.MlflowClient(server.address).create_experiment("sdtp")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        start_pipeline(results / "default", CONFIG, "sdtp", None)
        with step("train", arguments(tmp_path), outputs=[tmp_path / "out"]) as log:
            for at in range(1200):
                log.metric("loss", 1 / (at + 1), step=at)
            log.dataset("train", tmp_path / "out", "ab" * 32)
        finish_pipeline(results / "default", "FINISHED")
        proxy.shutdown()
    assert len(waiting(results / "mlflow-spool")) == {"all": 2, "the first of each": 0}[lost]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    track.main(["sync", "--results", str(results)])
    active = "select name, status from runs where lifecycle_stage = 'active' order by name"
    assert rows(server.database, active) == [("pipeline default", "FINISHED"), ("train", "FINISHED")]
    assert len(rows(server.database, "select * from runs where lifecycle_stage = 'deleted'")) >= 1
    assert rows(server.database, "select count(*) from metrics where key = 'loss'") == [(1200,)]
    assert rows(server.database, "select count(*) from inputs") == [(1,)]


@pytest.mark.slow
def test_eight_steps_log_to_one_server(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    process: Callable[..., subprocess.Popen[str]],
) -> None:
    """Eight processes, 1,000 metrics each, at the same moment, against four workers on one SQLite file."""
    server.start(workers=4)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    start_pipeline(results / "default", CONFIG, "sdtp", None)
    jobs = [process(tmp_path / f"out-{index}", "1000") for index in range(8)]
    for one in jobs:
        says(one, "inside")
    for one in jobs:
        goes_on(one)
    for one in jobs:
        assert ends(one) == ""
    finish_pipeline(results / "default", "FINISHED")
    assert rows(server.database, "select status, count(*) from runs group by status") == [("FINISHED", 9)]
    per_run = "select count(*), count(distinct step) from metrics where key = 'loss' group by run_uuid"
    assert rows(server.database, per_run) == [(1000, 1000)] * 8
    assert waiting(results / "mlflow-spool") == []
