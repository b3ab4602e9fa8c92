"""`sdtp` of the environment that forks: what it does is what `sdtp` does, and code that differs is run as it is."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import Started
from tests.workflow import forked
from tests.workflow.project import ROOT

OWN = "a process of its own:"

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """That environment, where a process of its own says so and what it is called with."""
    folder = Path(forked.python()).parents[1]
    (tmp_path / "bin").mkdir()
    shutil.copy2(folder / "bin" / "sdtp", tmp_path / "bin")
    settings = json.loads((folder / "forked.json").read_text(encoding="utf-8"))
    own = tmp_path / "own"
    own.write_text(f'#!/bin/sh\necho {OWN} "$@"\n', encoding="utf-8")
    own.chmod(0o755)
    (tmp_path / "forked.json").write_text(json.dumps(settings | {"program": str(own)}), encoding="utf-8")
    return tmp_path


def call(program: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], env=os.environ | variables, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("arguments", [["--version"], ["score", "--help"], ["no-step"], ["show", "nowhere"]])
def test_what_it_prints_and_ends_with_is_what_sdtp_does(environment: Path, arguments: list[str]) -> None:
    there = call(environment / "bin" / "sdtp", *arguments)
    here = call(Path(sys.executable).parent / "sdtp", *arguments)
    assert (there.returncode, there.stdout, there.stderr) == (here.returncode, here.stdout, here.stderr)


def test_the_same_code_elsewhere_is_forked_and_changed_code_is_not(environment: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src" / "sdtp", source / "sdtp", ignore=shutil.ignore_patterns("__pycache__"))
    asked = environment / "bin" / "sdtp"
    assert call(asked, "--version", PYTHONPATH=str(source)).stdout.startswith("sdtp ")
    with (source / "sdtp" / "pruning" / "scorers.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert call(asked, "--version", PYTHONPATH=str(source)).stdout == f"{OWN} --version\n"


def test_what_is_read_on_import_is_not_forked(environment: Path) -> None:
    asked = environment / "bin" / "sdtp"
    assert call(asked, "--version", HF_HUB_OFFLINE="1").stdout == f"{OWN} --version\n"
    assert call(asked, "lease", "--gpus", "1").stdout == f"{OWN} lease --gpus 1\n"
    assert call(asked, "--quiet", "show").stdout == f"{OWN} --quiet show\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_forked_process_too(environment: Path, tmp_path: Path, number: signal.Signals) -> None:
    prompt = tmp_path / "prompt.txt"
    os.mkfifo(prompt)
    program, folder = str(environment / "bin" / "sdtp"), str(tmp_path)
    client = Started(tmp_path, program, "show", str(prompt), "--model", folder, "--pruner", folder)
    ends: list[int] = []

    def reads() -> bool:
        with contextlib.suppress(OSError):  # nobody reads yet
            ends.append(os.open(prompt, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    client.until(reads)
    unread = select.poll()
    unread.register(ends[0], 0)  # no event but that nobody reads any more
    assert not unread.poll(0)
    client.process.send_signal(number)
    assert client.wait() == -number
    assert unread.poll(30_000)
    os.close(ends[0])
