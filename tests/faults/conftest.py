"""What the tests of faults share: the process that forks, a run that nobody disturbed, the table of what was seen."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forking import Forking
from tests.faults.run import Run, finish

# Of the second and third column, where a section's are not the usual ones.
COLUMNS = {"Malformed files": ("read by", "what is said")}


class Table:
    """Rows of docs/measurements/faults.md, filled by the tests that pass."""

    def __init__(self) -> None:
        self._sections: dict[str, list[tuple[str, ...]]] = defaultdict(list)

    def add(self, section: str, *cells: object) -> None:
        """A row: what was done, how often, and what came of it; or what `COLUMNS` says."""
        self._sections[section].append(tuple(map(str, cells)))

    def write(self, path: Path) -> None:
        """The page."""
        lines = [
            "# Faults",
            "",
            "What was done to real processes and real files, and what came of it: rows are written by the tests that",
            "passed, in one run of",
            "",
            "```bash",
            "SDTP_FAULTS_TABLE=docs/measurements/faults.md .venv/bin/pytest tests/faults",
            "```",
            "",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; the",
            "configuration of tests/workflow/tiny.yaml (a random model of four layers). \"Same\" means: every file the",
            "step writes has the SHA-256 it has in a run that nobody disturbed; of timings and metrics, everything but",
            "measured numbers.",
        ]  # fmt: skip
        for section, rows in self._sections.items():
            second, third = COLUMNS.get(section, ("how often", "what came of it"))
            lines += ["", f"## {section}", "", f"| what | {second} | {third} |", "|---|---|---|"]
            lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """Rows to write to the file that SDTP_FAULTS_TABLE names, if it is set."""
    rows = Table()
    yield rows
    if name := os.environ.get("SDTP_FAULTS_TABLE"):
        rows.write(Path(name))


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """Starts `sdtp` and `snakemake` in milliseconds."""
    process = Forking(tmp_path_factory.mktemp("forking"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, forking: Forking) -> Run:
    """A finished run that nobody disturbed, and that nobody may change."""
    return finish(tmp_path_factory.mktemp("undisturbed") / "sdtp", forking)
