"""Damaged, wrong and hostile files: one line that names the file and the fault, exit code 1, nothing run or written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Table
from tests.faults.forking import SITE, Forking
from tests.faults.malformed import CANARY, CASES, Case
from tests.faults.run import Run, everything

pytestmark = pytest.mark.slow

# Address space: what a bomb would need is not to be had.
MOST_MEMORY = 12 * 2**30
FILES = [case for case in CASES if case.job != "snakemake"]
CONFIGS = [case for case in CASES if case.job == "snakemake"]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_a_malformed_file_is_named_with_its_fault(
    case: Case, undisturbed: Run, forking: Forking, tmp_path: Path, table: Table
) -> None:
    folder = undisturbed.copy(tmp_path)
    arguments = undisturbed.jobs[case.job].with_settings(case.damage(folder))
    before, results = everything(folder, "logs", "results"), everything(folder / "results")
    ended = forking(folder, arguments, limits={"RLIMIT_AS": MOST_MEMORY}, timeout=60)
    assert ended.status == 1, ended.stderr
    assert [word for word in case.words if word not in ended.error] == [], ended.error
    assert not list(tmp_path.rglob(CANARY))
    assert everything(folder, "logs", "results") == before
    # What is whole of the run stays as it was; nothing half-made is left behind.
    assert everything(folder / "results") == results
    message = ended.error.replace(str(folder), "…")
    table.add(
        "Malformed files", case.name.replace("_", " "), case.job, message if len(message) < 200 else message[:200] + "…"
    )


@pytest.mark.parametrize("case", CONFIGS, ids=lambda case: case.name)
def test_a_malformed_configuration_is_refused_before_anything_runs(
    case: Case, undisturbed: Run, forking: Forking, tmp_path: Path, table: Table
) -> None:
    folder = shutil.copytree(undisturbed.folder, tmp_path / "sdtp")
    case.damage(folder)
    before = everything(folder, ".snakemake")
    ended = forking(folder, ["--cores", "1", "--configfile", "tiny.yaml"], program="snakemake", timeout=60)
    assert ended.status == 1, ended.stderr
    said = [line for line in ended.stderr.splitlines() if all(word in line for word in case.words)]
    assert said, ended.stderr
    assert "Traceback" not in ended.stderr
    assert everything(folder, ".snakemake") == before
    table.add("Malformed files", case.name.replace("_", " "), "snakemake", said[0].strip())


def test_debug_shows_where(undisturbed: Run, forking: Forking, tmp_path: Path) -> None:
    folder = undisturbed.copy(tmp_path)
    case = next(case for case in CASES if case.name == "tokenizer_cut_off")
    arguments = undisturbed.jobs[case.job].with_settings(case.damage(folder))
    ended = forking(folder, ["--debug", *arguments])
    assert ended.status == 1
    assert "Traceback (most recent call last)" in ended.stderr
    assert "JSONDecodeError" in ended.stderr  # what the library raised, as well


def test_the_files_are_fifty_and_whole_ones_are_taken(undisturbed: Run, forking: Forking, tmp_path: Path) -> None:
    """The cases fail for the damage alone: what they damage is read as it is."""
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)
    folder = undisturbed.copy(tmp_path)
    for name in sorted({case.job for case in FILES}):
        ended = forking(folder, undisturbed.jobs[name].arguments)
        assert ended.status == 0, ended.stderr
    assert not (folder / SITE).exists()
