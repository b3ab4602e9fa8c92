"""Steps as processes: one writer at a time, metrics on disk, signals that end a step as they should."""

import argparse
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.step import step

pytestmark = pytest.mark.usefixtures("no_tracking")

PATIENCE = 60.0

# A step that says "ready", waits for a line, and is then done.
WAITING_STEP = """
import argparse, signal, sys
from pathlib import Path
from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.step import step
folder = Path(sys.argv[1])
if "chain" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: print("chained", flush=True))
args = argparse.Namespace(settings="{}", metrics=folder / "metrics.json")
with step("wait", args, outputs=[folder / "out.txt"]), write_atomically(folder / "out.txt") as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def waiting_step(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WAITING_STEP, str(tmp_path), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(settings='{"seed":0}', metrics=folder / "metrics" / "train.json")


def test_final_metrics_and_resources_are_written(tmp_path: Path) -> None:
    ballast = []
    with step("train", arguments(tmp_path), outputs=[tmp_path / "pruner"]) as log:
        ballast.append(b"x" * 50_000_000)
        log.metric("loss", 3.0, step=1)
        log.metrics({"tau": 0.5, "examples": 48})
        assert not (tmp_path / "metrics" / "train.json").exists()
    written = json.loads((tmp_path / "metrics" / "train.json").read_text())
    assert {key: written[key] for key in ("tau", "examples", "device")} == {"tau": 0.5, "examples": 48, "device": "cpu"}
    assert "loss" not in written  # a point of a curve is no final result
    assert written["peak_rss_bytes"] > len(ballast[0])
    assert 0 <= written["wall_seconds"] < PATIENCE


def test_a_failed_step_leaves_no_metrics(tmp_path: Path) -> None:
    def fail() -> None:
        with step("train", arguments(tmp_path), outputs=[tmp_path / "pruner"]) as log:
            log.metric("tau", 0.5)
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fail()
    assert not (tmp_path / "metrics").exists()


def test_numbers_that_are_not_finite_are_null_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), step("train", arguments(tmp_path), outputs=[tmp_path / "x"]) as log:
        for at in range(3):
            log.metric("loss", float("nan"), step=at)
        log.metric("best", float("inf"))
    assert json.loads((tmp_path / "metrics" / "train.json").read_text())["best"] is None
    assert [record.getMessage() for record in caplog.records] == [
        "metric 'loss' is nan at step 0: such values are kept from the tracker",
        "metric 'best' is inf: such values are kept from the tracker",
    ]


def test_names_of_the_steps_own_metrics_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'wall_seconds'"),
        step("train", arguments(tmp_path), outputs=[tmp_path / "x"]) as log,
    ):
        log.metric("wall_seconds", 1.0)


def test_a_second_writer_is_refused_and_told_what_to_do(
    tmp_path: Path, waiting_step: Callable[..., subprocess.Popen[str]]
) -> None:
    first = waiting_step()
    with (
        pytest.raises(UserError, match=rf"out\.txt is being written by process {first.pid} on .* stop it"),
        step("wait", arguments(tmp_path), outputs=[tmp_path / "out.txt"]),
    ):
        pytest.fail("two writers at once")
    with step("wait", arguments(tmp_path), outputs=[tmp_path / "other.txt"]):  # the same folder, another output
        pass
    first.communicate("\n", PATIENCE)
    assert (tmp_path / "out.txt").read_text() == "half"
    with step("wait", arguments(tmp_path), outputs=[tmp_path / "out.txt"]):
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path, waiting_step: Callable[..., subprocess.Popen[str]]) -> None:
    first = waiting_step()
    first.kill()
    first.wait(PATIENCE)
    with step("wait", arguments(tmp_path), outputs=[tmp_path / "out.txt"]):
        pass


def test_what_a_killed_writer_left_goes_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    shared = tmp_path / "figures"
    shared.mkdir()
    (tmp_path / "metrics").mkdir()
    left = [
        tmp_path / name
        for name in ("figures/.tmp-0123abcd-a.svg", ".tmp-0123abcd-pruner", "metrics/.tmp-0123abcd-train.json")
    ]
    written = [
        tmp_path / name
        for name in ("figures/.tmp-0123abcd-b.svg", ".tmp-0123abcd-model", "metrics/.tmp-0123abcd-x.json")
    ]
    for path in (*left, *written):
        path.touch()
    with step("train", arguments(tmp_path), outputs=[shared, shared / "a.svg", tmp_path / "pruner"]):
        assert [path.exists() for path in (*left, *written)] == [False] * 3 + [True] * 3


def test_sigterm_cleans_up_and_then_kills(tmp_path: Path, waiting_step: Callable[..., subprocess.Popen[str]]) -> None:
    process = waiting_step()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == [".out.txt.lock"]


def test_sigterm_goes_on_to_the_handler_before(
    tmp_path: Path, waiting_step: Callable[..., subprocess.Popen[str]]
) -> None:
    process = waiting_step("chain")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert output == "chained\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "out.txt").exists()


def test_the_handler_before_is_back_after_a_step(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with step("train", arguments(tmp_path), outputs=[tmp_path / "x"]):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
