"""What a shell is told at the press of the tab key, and that it is what the steps really take."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import argcomplete
import pytest

from sdtp import cli, completion

STEPS = cli.steps()


# Options whose names are computed: completion does not know them.
COMPUTED = {"tune-schedule": {"--flops", "--latency", "--memory"}}


def answer(line: str) -> list[str]:
    """What argcomplete finds for a line whose last word is being typed.

    Not through its public function, which takes and closes descriptors 8 and 9 of this process: that is what the test
    with a shell is for.
    """
    parser = cli._options()
    completion.with_options(parser, cli._modules(), line)
    *words, last = line.split(" ")
    found = argcomplete.CompletionFinder(parser)._get_completions(words, last, "", None)
    return sorted(word.strip() for word in found)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sdtp sal", ["saliency", "saliency-index"]),
        ("sdtp --verb", ["--verbose"]),
        ("sdtp -q compare prompt.txt --ra", ["--ratio", "--raw"]),
        ("sdtp show x --dtype ", ["auto", "bfloat16", "float16", "float32"]),
        ("sdtp lease --g", ["--gpus"]),
        ("sdtp verify --fam", ["--families"]),
    ],
)
def test_answers(line: str, told: list[str]) -> None:
    assert answer(line) == told


def test_a_shell_is_answered_without_importing_torch() -> None:
    line = "sdtp compare --max"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    # As the function that register-python-argcomplete prints: answers are read from descriptor 8.
    python = f"{sys.executable} -X importtime -c 'from sdtp.cli import main; main()' 8>&1 9>/dev/null 1>/dev/null"
    found = subprocess.run(
        ["bash", "-c", python], env={**os.environ, **shell}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["--max-new-tokens"]
    imported = {row.split("|")[-1].strip() for row in found.stderr.splitlines()}
    assert "argcomplete" in imported
    assert not {"torch", "transformers", "mlflow"} & imported


@pytest.mark.parametrize("name", [*STEPS, cli.LEASE])
def test_options_are_those_of_the_step(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = "devices" if name == cli.LEASE else f"steps.{name.replace('-', '_')}"
    with pytest.raises(SystemExit):
        importlib.import_module(f"sdtp.pipeline.{module}").main(["--help"])
    told = capsys.readouterr().out
    listed = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", told, re.MULTILINE)) - {"--help"}
    read = {flag for flags, _ in completion.arguments(cli._modules()[name]) for flag in flags if flag.startswith("--")}
    assert read == listed - COMPUTED.get(name, set())


def test_what_is_not_written_out_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "step.py"
    path.write_text(
        "def main(argv):\n    parser = P(description='x')\n"
        "    parser.add_argument('--one', choices=NAMES, help=f'{x}')\n"
        "    group.add_argument('-t', '--two', choices=('a', 'b'), type=Path, required=True)\n"
        "    parser.add_argument('rest', nargs='*', help='what' ' else')\n"
        "    parser.add_argument(f'--{name}', help='which')\n"
    )
    assert list(completion.arguments(path)) == [
        (["--one"], {}),
        (["-t", "--two"], {"choices": ("a", "b")}),
        (["rest"], {"nargs": "*", "help": "what else"}),
    ]
    parser = argparse.ArgumentParser()
    completion.with_options(parser, {"step": path, "other": path}, "sdtp step -")
    assert parser.parse_args(["step", "-t", "b", "c", "d"]).rest == ["c", "d"]
    with pytest.raises(SystemExit):
        parser.parse_args(["other", "-t", "b"])  # not named in the line: its options are not read
