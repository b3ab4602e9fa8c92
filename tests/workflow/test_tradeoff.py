"""`snakemake tradeoff`: what is planned, what the tiny run gives, and that a change reruns what uses it."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

pytestmark = pytest.mark.slow

RATIOS = ("0.8", "0.5")
TIMED = ("sdtp", "random", "fastkv", "h2o", "sdtp+h2o")


@pytest.fixture(scope="module")
def compared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished tiny run in which the trade-off was made."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("compared") / "sdtp", symlinks=True)
    snakemake(folder, "tradeoff", "--configfile", "tiny.yaml")
    return folder


def test_default_plan(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    counts = job_counts(snakemake(folder, "--dry-run", "tradeoff").stdout)
    data = {"data": 1, "test_data": 1, "benchmark_text": 1}
    run = {"model": 1, "check": 1, **data, "saliency": 2, "saliency_index": 1, "train": 1}
    # Unpruned, 4 methods of the run and 6 peers at 3 ratios, and H2O on the whole prompt.
    own = {"reference": 1, "evaluate": 1 + 10 * 3 + 1, "time_methods": 3, "time_compression": 1, "tradeoff_tables": 1}
    assert counts == run | own
    output = snakemake(folder, "--dry-run", "tradeoff", "--configfile", "config/paper/qwen2-7b.yaml").stdout
    assert job_counts(output)["kvpress_time"] == 2 * 3
    bloom = job_counts(snakemake(folder, "--dry-run", "tradeoff", "--configfile", "config/paper/bloom-7b.yaml").stdout)
    assert "time_compression" not in bloom
    assert "kvpress" not in bloom


def test_keep_ratio_one_is_timed_beside_the_compression_of_whole_prompts(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    (folder / "kept.yaml").write_text("pruning: {keep_ratios: [1.0, 0.9]}\n", encoding="utf-8")
    counts = job_counts(snakemake(folder, "--dry-run", "tradeoff", "--configfile", "kept.yaml").stdout)
    assert (counts["time_methods"], counts["time_compression"]) == (2, 1)


def test_what_a_cache_is_compressed_on_top_of_is_measured_where_the_run_has_it_not(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    (folder / "without.yaml").write_text("evaluation: {methods: [recent, lastquery]}\n", encoding="utf-8")
    output = snakemake(folder, "--dry-run", "--printshellcmds", "tradeoff", "--configfile", "without.yaml").stdout
    for ratio in (0.9, 0.8, 0.7):
        assert f"results/default/evaluation/sdtp-{ratio}.jsonl" in output
        assert f"results/default/timings/sdtp-{ratio}.json" in output


def test_every_method_has_quality_and_its_own_speed(compared: Path) -> None:
    results = compared / "results" / "tiny"
    table = pd.read_csv(results / "tables" / "tradeoff.csv")
    pruned = {(method, float(ratio)) for method in TIMED for ratio in RATIOS}
    cells = {("unpruned", 1.0), ("unpruned+h2o", 1.0)} | pruned
    panels = {(task, metric) for task in ("retrieval", "continuation") for metric in ("loss", "kl", "top1")}
    panels |= {("retrieval", "accuracy")}
    found = table[["task", "metric", "method", "keep_ratio", "timed_tokens"]].itertuples(index=False, name=None)
    assert sorted(found) == sorted((*panel, *cell, length) for panel, cell, length in product(panels, cells, (64, 128)))
    assert (table["n"] == 2).all()
    assert table["prefill_speedup"].notna().all()
    assert (table["model"] == "tiny-model").all()
    quality = pd.read_csv(results / "tables" / "quality.csv")
    keys = ["task", "metric", "method", "keep_ratio"]
    both = quality.merge(table[table["timed_tokens"] == 64], on=keys, suffixes=("", "_own"))
    assert len(both) == len(quality)
    assert both["value"].tolist() == both["value_own"].tolist()
    # Fewer tokens in the cache, whatever the time on a machine that does other things.
    smaller = table[(table["method"] == "sdtp+h2o") & (table["keep_ratio"] == 0.5)]
    assert (smaller["kv_cache_bytes"] < 0.5 * smaller["unpruned_kv_cache_bytes"]).all()
    compressed = table[table["method"] == "h2o"]
    assert (compressed["flop_bound"] < 1).all()
    assert (compressed["from_prefill"] > 0).all()
    for name in ("tradeoff", "tradeoff-memory"):
        assert (results / "figures" / f"{name}.svg").stat().st_size > 10_000
        assert (results / "figures" / f"{name}.png").stat().st_size > 10_000


def test_compression_table_has_both_bases(compared: Path) -> None:
    table = pd.read_csv(compared / "results" / "tiny" / "tables" / "cache-compression.csv")
    rows = table[(table["task"] == "continuation") & (table["metric"] == "loss")]
    found = {(row["base"], row["rule"], row["keep_ratio"]) for row in rows.to_dict("records")}
    sdtp = {("sdtp", rule, float(ratio)) for rule in ("none", "h2o") for ratio in RATIOS}
    assert found == {("unpruned", "none", 1.0), ("unpruned", "h2o", 1.0)} | sdtp
    share = rows[(rows["base"] == "unpruned") & (rows["rule"] == "h2o")]["cache_share"].item()
    assert share == pytest.approx(0.4, abs=0.01)


def test_arms_of_a_job_ran_side_by_side(compared: Path) -> None:
    timings = compared / "results" / "tiny" / "timings"
    jobs = [json.loads((timings / f"{method}-0.5.json").read_text()) for method in TIMED]
    assert len({json.dumps(job["rows"][::2]) for job in jobs}) == 1  # one unpruned arm for all
    assert [[row["method"] for row in job["rows"]] for job in jobs] == [["unpruned", method] * 2 for method in TIMED]
    assert all(len(row["prefill_s"]) == 5 for job in jobs for row in job["rows"])


GATHERED = {"tradeoff"}
COMPRESSED = {"evaluate/sdtp+h2o-0.8", "evaluate/sdtp+h2o-0.5", "evaluate/unpruned+h2o-1.0"}
TIMINGS = {f"time-methods/{ratio}" for ratio in RATIOS}
WHOLE = {"time-compression/1.0"}


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"peers": {"cache_keep": 0.5}}, COMPRESSED | TIMINGS | WHOLE | GATHERED),
    ({"peers": {"layer": 1}}, {"evaluate/fastkv-0.8", "evaluate/fastkv-0.5"} | TIMINGS | GATHERED),
    ({"peers": {"prompt_tokens": [64]}}, TIMINGS | WHOLE | GATHERED),
    ({"evaluation": {"seeds": [0]}}, {"evaluate/random-0.8", "evaluate/random-0.5"} | GATHERED),
    ({"benchmark": {"prompt_tokens": [64]}}, {"check"}),
    (
        {"peers": {"methods": ["fastkv", "h2o", "sdtp+h2o", "snapkv"]}},
        {"evaluate/snapkv-0.8", "evaluate/snapkv-0.5"} | TIMINGS | GATHERED,
    ),
]


@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_changed_setting_reruns_what_uses_it(
    compared: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert planned(compared, "tradeoff", "--configfile", overlay(tmp_path / "changed.yaml", change)) == jobs
