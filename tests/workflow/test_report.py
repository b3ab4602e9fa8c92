"""`snakemake --report`: what the run made, with captions, in one archive that anyone can open."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from sdtp.pipeline.figures import FIGURES
from tests.workflow.project import snakemake

pytestmark = pytest.mark.slow

TABLES = ("latency", "quality", "comparisons", "targets", "sparsity", "foresight")


def test_snakemakes_own_report_has_the_page_the_tables_and_the_figures(finished_run: Path, tmp_path: Path) -> None:
    snakemake(finished_run, "--configfile", "tiny.yaml", "--report", str(tmp_path / "workflow.zip"))
    results = finished_run / "results" / "tiny"
    expected = [results / "report.html"]
    expected += [results / "tables" / f"{name}.csv" for name in TABLES]
    expected += [results / "figures" / f"{name}.svg" for name in FIGURES]
    with zipfile.ZipFile(tmp_path / "workflow.zip") as archive:
        held = {Path(name).name: archive.read(name) for name in archive.namelist() if "/data/" in name}
        page = archive.read("workflow/report.html").decode()
    assert held == {path.name: path.read_bytes() for path in expected}
    for caption in ("Everything of run tiny on one page, in one file.", "over interleaved repeats, with quartiles"):
        assert caption in page
