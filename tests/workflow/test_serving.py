"""`snakemake serving`: what is planned, what the tiny run gives, and that a change reruns what it decides."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run in which serving was measured as well. Not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("served") / "sdtp", symlinks=True)
    process = snakemake(folder, "serving", "--configfile", "tiny.yaml")
    assert job_counts(process.stdout) == {"throughput": 3, "longest_prompt": 1, "serving_tables": 1}
    return folder


def test_plans_have_a_job_a_placement_and_as_many_gpus(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    assert job_counts(snakemake(folder, "serving", "--dry-run").stdout)["throughput"] == 4
    output = snakemake(
        folder, "serving", "--dry-run", "--configfile", "config/paper/qwen2-7b.yaml", "--resources", "gpu=8"
    )
    for placement, gpus in (("one", 1), ("split-2", 2), ("tensor-2", 2), ("replicas-8", 8)):
        assert f"sdtp lease --gpus {gpus} -- sdtp --log logs/qwen2-7b/throughput/{placement}.log" in output.stdout


def test_every_placement_has_its_rows_or_the_reason(served: Path) -> None:
    results = served / "results" / "tiny"
    table = pd.read_csv(results / "tables" / "throughput.csv")
    assert table["placement"].value_counts().to_dict() == {"one": 6, "replicas-2": 8, "split-2": 1}
    run = table[table["not_run"].isna()]
    assert (run[["requests_per_s", "prefill_speedup", "end_to_end_over_one"]] > 0).all(axis=None)
    longest = pd.read_csv(results / "tables" / "longest-prompt.csv")
    assert longest["keep_ratio"].tolist() == [1.0, 0.8, 0.5]
    assert longest["at_context_limit"].all()
    for kind in ("svg", "png"):
        assert (results / "figures" / f"serving.{kind}").stat().st_size > 5000


def test_a_change_reruns_what_it_decides(served: Path, tmp_path: Path) -> None:
    def plan(change: dict[str, object]) -> set[str]:
        return planned(served, "serving", "--configfile", overlay(tmp_path / "changed.yaml", {"serving": change}))

    times = {f"throughput/{placement}" for placement in ("one", "replicas-2", "split-2")}
    assert plan({}) == set()
    assert plan({"requests": 8}) == {*times, "serving-tables"}
    assert plan({"length_step": 32}) == {"longest-prompt", "serving-tables"}
    assert plan({"new_tokens": 3}) == {*times, "longest-prompt", "serving-tables"}
    assert plan({"placements": ["one"]}) == {"serving-tables"}
    whole = snakemake(
        served, "--dry-run", "--configfile", overlay(tmp_path / "changed.yaml", {"serving": {"requests": 8}})
    )
    assert "Nothing to be done" in whole.stdout
