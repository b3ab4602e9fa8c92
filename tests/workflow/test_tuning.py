"""A schedule that was tuned for a keep ratio, from held-out examples to the tables, beside the geometric one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoConfig

from sdtp.pruning import flops
from sdtp.pruning.pruner import TokenPruner
from tests.workflow import tiny_model
from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

pytestmark = pytest.mark.slow

TUNED: dict[str, Any] = {
    "data": {"train": {"heldout": 12}},
    "pruning": {"keep_ratios": [0.5]},
    "saliency": {"shards": 1},
    "training": {"steps": 1, "label_epochs": 1, "evaluate_every": 1, "checkpoint_every": 1},
    "evaluation": {"methods": ["sdtp", "sdtp-tuned"]},
    "peers": {"methods": [], "prompt_tokens": [64]},
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose trade-off has the tuned pruner in it. Not to be changed."""
    folder = copy_project(tmp_path_factory.mktemp("tuned") / "sdtp")
    tiny_model.make(folder / "tiny-model")
    process = snakemake(folder, "tradeoff", "--configfile", overlay(folder / "tuned.yaml", TUNED))
    counts = job_counts(process.stdout)
    assert (counts["train"], counts["tune"], counts["evaluate"], counts["time_methods"]) == (1, 1, 3, 1)
    return folder


def test_the_tuned_schedule_reaches_the_tables_at_the_flops_of_the_keep_ratio(compared: Path) -> None:
    results = compared / "results" / "tiny"
    folder = results / "tuned" / "0.5"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "pruner.json",
        "pruner.safetensors",
        "tuning.json",
        "tuning.png",
        "tuning.svg",
    ]
    told = json.loads((folder / "tuning.json").read_text("utf-8"))
    trained, tuned = TokenPruner.from_pretrained(results / "pruner"), TokenPruner.from_pretrained(folder)
    asked, config = trained.schedule.with_ratio(0.5), AutoConfig.from_pretrained(results / "model")
    assert told["keep_ratio"] == 0.5
    assert sum(told["examples"]["reporting"].values()) == 6
    tokens = told["prompt_tokens"]
    spent, given = (flops.prefill(config, tokens, schedule, tuned.scorer) for schedule in (tuned.schedule, asked))
    assert 0.9 * given < spent <= given * (1 + 1e-12)
    for method, schedule in (("sdtp-tuned", tuned.schedule), ("sdtp", asked)):
        found = rows(results / "evaluation" / f"{method}-0.5.jsonl")
        assert len(found) == 4
        for row in found:
            assert row["kept_tokens"] == schedule.surviving(row["prompt_tokens"])[-1]
    table = pd.read_csv(results / "tables" / "tradeoff.csv", dtype={"stages": str})
    own = table[table["method"] == "sdtp-tuned"]
    assert len(own) == len(table[table["method"] == "sdtp"]) >= 3
    before = (1.0, *tuned.schedule.keep[:-1])
    used = [layer for layer, a, b in zip(tuned.schedule.layers, before, tuned.schedule.keep, strict=True) if b < a]
    assert set(own["stages"]) == {" ".join(map(str, used))}
    assert own["prefill_speedup"].notna().all()


def test_a_pruner_that_is_trained_again_is_tuned_again_and_too_few_examples_are_refused(compared: Path) -> None:
    assert planned(compared, "tradeoff", "--configfile", "tuned.yaml") == set()
    again = overlay(compared / "again.yaml", TUNED, {"training": {"learning_rate": 0.01}})
    jobs = {"train", "tune/0.5", "evaluate/sdtp-0.5", "evaluate/sdtp-tuned-0.5", "time-methods/0.5", "tradeoff"}
    assert planned(compared, "tradeoff", "--configfile", again) == jobs
    few = overlay(compared / "few.yaml", TUNED, {"data": {"train": {"heldout": 11}}})
    process = snakemake(compared, "tradeoff", "--dry-run", "--configfile", few, check=False)
    assert process.returncode == 1
    assert "data.train.heldout = 11: method sdtp-tuned needs 12 or more, because half of them choose" in process.stdout
