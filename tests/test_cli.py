"""The command line maps names to steps, tells a user's fault in one line, and keeps a log."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtp import cli
from sdtp.errors import UserError

STEPS = [
    "ablation",
    "benchmark",
    "benchmark-text",
    "budgets",
    "check",
    "compare",
    "data",
    "doctor",
    "evaluate",
    "figures",
    "generate",
    "harness",
    "harness-table",
    "longbench-data",
    "longest-prompt",
    "model",
    "multiple-choice-data",
    "paper",
    "predict",
    "recommend",
    "reference",
    "register",
    "report",
    "ruler-data",
    "saliency",
    "saliency-index",
    "score",
    "serving-tables",
    "show",
    "suite-table",
    "sweep-evaluate",
    "sweep-table",
    "sweep-train",
    "tables",
    "test-data",
    "throughput",
    "time-methods",
    "time-shortened",
    "track",
    "tradeoff",
    "train",
    "tune",
    "tune-schedule",
    "verify",
]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TQDM_DISABLE", "TQDM_MININTERVAL"):
        monkeypatch.setenv(name, "")  # so that it is set back
        monkeypatch.delenv(name)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A module that stands in for step `model`, and the arguments it was called with."""
    calls: list[list[str]] = []

    class Module:
        @staticmethod
        def main(argv: list[str]) -> None:
            calls.append(argv)
            if "--fault" in argv:
                raise UserError("model.source.ref = 'x': no such folder")
            if "--talk" in argv:
                logging.getLogger("sdtp.talk").debug("own debug")
                logging.getLogger("sdtp.talk").warning("own warning")
                logging.getLogger("library").info("library info")
            if "--crash" in argv:
                raise RuntimeError("a defect")

    monkeypatch.setitem(sys.modules, "sdtp.pipeline.steps.model", Module)  # type: ignore[arg-type]
    return calls


def test_every_step_is_listed_with_what_it_does() -> None:
    assert list(cli.steps()) == STEPS
    tools, steps = cli._parser().format_help().partition("\ntools:\n")[2].split("\nsteps:\n")
    called = [line.split()[0] for line in tools.splitlines() if line]
    assert called == ["doctor", "show", "compare", "verify", "recommend", "tune-schedule", "track", "lease"]
    assert [line.split()[0] for line in steps.splitlines()] == [name for name in STEPS if name not in called]
    assert all(len(line.split(maxsplit=1)[1]) > 15 for line in (tools + steps).splitlines() if line)


def test_called_with_nothing_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "\ntools:\n  doctor " in told.err


@pytest.mark.slow
def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom sdtp.cli import main\n"
        "try:\n    main([sys.argv[1]])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'mlflow', 'snakemake'} & set(sys.modules)"
    )
    for option in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", code, option], check=True, capture_output=True)


def test_arguments_reach_the_step_as_they_are(step: list[list[str]]) -> None:
    arguments = ["--settings", '{"a": "b c"}', "--output", "x", "--", "--log", "y"]
    assert cli.main(["model", *arguments]) == 0
    assert step == [arguments]


def test_users_fault_is_one_line(step: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "model.log"
    assert cli.main(["--log", str(log), "model", "--fault"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(": model --fault")
    assert lines[1:] == ["error: model.source.ref = 'x': no such folder"]
    assert log.read_text(encoding="utf-8").splitlines() == lines


def test_debug_shows_where_a_fault_was_raised(step: list[list[str]]) -> None:
    with pytest.raises(UserError):
        cli.main(["--debug", "model", "--fault"])


@pytest.mark.parametrize(
    ("options", "told", "bars"),
    [
        ([], ["own warning"], None),
        (["--log", "kept.log"], ["model --talk", "own warning", "model: done"], None),
        (["-q"], ["own warning"], "1"),
        (["--quiet"], ["own warning"], "1"),
        (["-v"], ["model --talk", "own debug", "own warning", "library info", "model: done"], None),
        (["--debug"], ["model --talk", "own debug", "own warning", "model: done"], None),
    ],
)
def test_levels(
    options: list[str],
    told: list[str],
    bars: str | None,
    step: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step that keeps a log says what was called and how long it took; a tool says no more than it has to."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([*options, "model", "--talk"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(told)
    assert all(expected in line for expected, line in zip(told, lines, strict=True))
    assert os.environ.get("TQDM_DISABLE") == bars
    # No terminal here: bars write seldom, or never.
    assert os.environ.get("TQDM_MININTERVAL") == (None if bars else "30")


def test_quiet_leaves_errors(step: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-q", "model", "--fault"]) == 1
    assert capsys.readouterr().err == "error: model.source.ref = 'x': no such folder\n"
    with pytest.raises(SystemExit) as end:
        cli.main(["-q", "-v", "model"])
    assert end.value.code == 2


def test_defect_is_raised_and_logged_with_its_traceback(step: list[list[str]], tmp_path: Path) -> None:
    log = tmp_path / "model.log"
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["--log", str(log), "model", "--crash"])
    text = log.read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "RuntimeError: a defect" in text


def test_failures_of_all_that_were_launched_together_are_in_one_log(
    step: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "model.log"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, option in enumerate(["--talk", "--fault", "--crash"]):
        monkeypatch.setenv("RANK", str(rank))
        with contextlib.suppress(RuntimeError):
            cli.main(["--log", str(log), "model", option])
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith(": model --talk")
    assert lines[1] == "own warning"
    assert "done in" in lines[2]
    fault = "process 1 of 3: error: model.source.ref = 'x': no such folder"
    assert lines[3:6] == [fault, "process 2 of 3 failed:", "Traceback (most recent call last):"]
    assert lines[-1] == "RuntimeError: a defect"
    assert capsys.readouterr().err.splitlines() == lines[:4]  # the traceback is Python's own to show


def test_finished_step_says_so_in_its_log(step: list[list[str]], tmp_path: Path) -> None:
    log = tmp_path / "model.log"
    log.write_text("of the run before\n", encoding="utf-8")
    assert cli.main(["--log", str(log), "model"]) == 0
    assert "model: done in 0.0 s" in log.read_text(encoding="utf-8")
    assert "of the run before" not in log.read_text(encoding="utf-8")


def test_unknown_step_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2
    assert "saliency-index" in capsys.readouterr().err
