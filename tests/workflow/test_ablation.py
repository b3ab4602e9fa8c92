"""`snakemake ablation`: what is planned for the shipped comparisons, what two variants of the tiny run give, and that a
change of one variant reruns that one alone."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdtp.pipeline.ablations import ABLATION_COLUMNS
from sdtp.pipeline.targets import TARGET_COLUMNS, TARGETS
from tests.workflow.project import copy_project, job_counts, overlay, planned, snakemake

pytestmark = pytest.mark.slow

# One ratio: fewer jobs, each of which starts a Python of its own.
SMALL: dict[str, Any] = {
    "pruning": {"keep_ratios": [0.8]},
    "variants": {"as-it-is": {}, "l2": {"saliency": {"reduction": "l2"}}},
}
OF_ONE = {"variants/l2/train", "variants/l2/evaluate/sdtp-0.8", "ablation"}
SMALLER_RATIO = {"variants/l2/evaluate/sdtp-0.5", "variants/as-it-is/evaluate/sdtp-0.5", "ablation"}
OF_OTHER = {"variants/as-it-is/train", "variants/as-it-is/evaluate/sdtp-0.8", "ablation"}
LABELS = {"labels/saliency/0", "labels/saliency/1", "labels/saliency-index"}


def due(folder: Path, config: str) -> set[str]:
    """The jobs of `ablation` that a dry run would run; labels under one name, whatever they are made from."""
    jobs = planned(folder, "ablation", "--configfile", config)
    return {re.sub(r"^ablation/labels/[0-9a-f]{12}/", "labels/", job) for job in jobs}


@pytest.fixture(scope="module")
def compared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run in which two variants were compared as well. Not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("compared") / "sdtp", symlinks=True)
    process = snakemake(folder, "ablation", "--configfile", overlay(folder / "small.yaml", SMALL))
    # Model, data, check and the evaluations of the other methods are those of the run.
    assert job_counts(process.stdout) == {
        "variant_saliency": 4,
        "variant_saliency_index": 2,
        "variant_train": 2,
        "variant_evaluate": 2,
        "ablation_table": 1,
    }
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("clone") / "sdtp")


@pytest.mark.parametrize(
    ("name", "variants", "labels", "references", "evaluations"),
    # Six labels for six variants; one for all losses; for the scorers, one and the paper's. References: unpruned and
    # recent; with lastquery and the oracle, each at two ratios.
    [("saliency", 6, 6, 2, 6), ("losses", 6, 1, 2, 6), ("scorer", 8, 2, 7, 16)],
)
def test_shipped_comparison_plans_each_variant_once(
    clone: Path, name: str, variants: int, labels: int, references: int, evaluations: int
) -> None:
    output = snakemake(clone, "ablation", "--dry-run", "--configfile", f"config/ablations/{name}.yaml").stdout
    assert job_counts(output) == {
        "model": 1,
        "check": 1,
        "data": 1,
        "test_data": 1,
        "reference": 1,
        "evaluate": references,
        "variant_saliency": 2 * labels,
        "variant_saliency_index": labels,
        "variant_train": variants,
        "variant_evaluate": evaluations,
        "ablation_table": 1,
    }
    assert f"results/{name}-ablation/ablation/ablation.csv" in output
    assert f"results/{name}-ablation/pruner" not in output


def test_without_variants_there_is_nothing_to_compare(clone: Path) -> None:
    process = snakemake(clone, "ablation", "--dry-run", check=False)
    assert process.returncode == 1
    assert "nothing to compare: the key `variants` of the configuration is empty" in process.stdout


def test_wrong_variant_is_refused_by_name(clone: Path, tmp_path: Path) -> None:
    config = overlay(tmp_path / "wrong.yaml", SMALL, {"variants": {"l2": {"saliency": {"reduction": "l3"}}}})
    process = snakemake(clone, "ablation", "--configfile", config, check=False)
    assert process.returncode == 1
    assert 'variants.l2.saliency.reduction = "l3": must be one of abs, signed, l2' in process.stdout
    assert "Traceback" not in process.stdout
    assert not (clone / "results").exists()


def test_variants_change_nothing_of_the_run(finished_run: Path, tmp_path: Path) -> None:
    config = overlay(tmp_path / "variants.yaml", {"variants": SMALL["variants"]})
    assert planned(finished_run, "--configfile", config) == set()


def test_snakemake_finds_nothing_to_criticise_with_variants(clone: Path) -> None:
    process = snakemake(clone, "--lint", "--configfile", "config/ablations/losses.yaml", check=False)
    assert "Congratulations, your workflow is in a good condition!" in process.stdout


def test_every_variant_has_what_its_settings_say(compared: Path) -> None:
    results = compared / "results" / "tiny"
    indexes = {
        path.parents[1].name: json.loads(path.read_text(encoding="utf-8"))["reduction"]
        for path in (results / "ablation" / "labels").glob("*/saliency/index.json")
    }
    assert sorted(indexes.values()) == ["abs", "l2"]
    run = (results / "pruner" / "pruner.safetensors").read_bytes()
    # The run's own settings give the run's own pruner, bit by bit.
    assert (results / "variants" / "as-it-is" / "pruner" / "pruner.safetensors").read_bytes() == run
    assert (results / "variants" / "l2" / "pruner" / "pruner.safetensors").read_bytes() != run
    # Two that trained at once in one folder would resume each other.
    assert all((results / "variants" / variant / "checkpoints" / "train").is_dir() for variant in SMALL["variants"])
    own = (results / "evaluation" / "sdtp-0.8.jsonl").read_bytes()
    assert (results / "variants" / "as-it-is" / "evaluation" / "sdtp-0.8.jsonl").read_bytes() == own


def test_table_holds_the_means_of_the_variants_evaluations(compared: Path) -> None:
    results = compared / "results" / "tiny"
    table = pd.read_csv(results / "ablation" / "ablation.csv", keep_default_na=False)
    assert list(table.columns) == ABLATION_COLUMNS
    assert sorted(set(zip(table["method"], table["variant"], table["keep_ratio"], strict=True))) == [
        ("random", "", 0.8),
        ("sdtp", "as-it-is", 0.8),
        ("sdtp", "l2", 0.8),
        ("unpruned", "", 1.0),
    ]
    losses = {}
    for variant in ("as-it-is", "l2"):
        path = results / "variants" / variant / "evaluation" / "sdtp-0.8.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        own = [row["loss"] for row in rows if row["task"] == "continuation"]
        losses[variant] = sum(own) / len(own)
        cell = table[(table["variant"] == variant) & (table["task"] == "continuation")].iloc[0]
        assert float(cell["value"]) == pytest.approx(losses[variant], abs=1e-12)
        assert (cell["n"], cell["baseline"]) == (len(own), "random")
    last = table[(table["variant"] == "l2") & (table["task"] == "continuation")].iloc[0]
    assert float(last["minus_first"]) == pytest.approx(losses["l2"] - losses["as-it-is"], abs=1e-12)
    trained = json.loads((results / "variants" / "l2" / "metrics" / "train.json").read_text(encoding="utf-8"))
    assert (int(last["label_updates"]), int(last["optimizer_steps"])) == (trained["label_updates"], 4)
    assert trained["label_updates"] > 0
    assert table.loc[table["method"] == "random", "kept_step"].eq("").all()
    targets = pd.read_csv(results / "ablation" / "targets.csv")
    assert list(targets.columns) == TARGET_COLUMNS
    assert list(targets["target"].drop_duplicates()) == list(TARGETS)
    assert set(targets["first"]) == {"sdtp/as-it-is@0.8", "sdtp/as-it-is@0.9"}
    # Two examples a task decide nothing, and the run has neither ratio 0.9 nor the paper's variant.
    assert set(targets.loc[targets["target"] == "no-worse", "outcome"]) == {"not decided"}
    assert set(targets.loc[targets["target"].isin(["oracle", "paper"]), "outcome"]) == {"not measured"}
    page = (results / "ablation" / "ablation.md").read_text(encoding="utf-8")
    assert page.startswith("# Variants of run tiny\n")
    assert "## Targets of as-it-is" in page
    assert page.count("| **l2** |") == table.groupby(["task", "metric"]).ngroups
    for kind in ("svg", "png"):
        assert (results / "ablation" / f"ablation.{kind}").stat().st_size > 5000


def test_tracked_runs_carry_their_variant(compared: Path) -> None:
    query = """
        SELECT step.value, variant.value FROM tags AS step JOIN tags AS variant ON step.run_uuid = variant.run_uuid
        WHERE step.key = 'sdtp.step' AND variant.key = 'sdtp.variant' ORDER BY 1, 2
    """
    with sqlite3.connect(compared / "results" / "mlflow.db") as store:
        tagged = store.execute(query).fetchall()
    assert tagged == [(step, variant) for step in ("evaluate", "train") for variant in ("as-it-is", "l2")]


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"variants": {"l2": {"training": {"steps": 5}}}}, OF_ONE),
    ({"variants": {"l2": {"pruning": {"sinks": 5}}}}, OF_ONE),
    ({"variants": {"l2": {"saliency": {"target": "logit"}}}}, OF_ONE | LABELS),
    ({"variants": {"l2": {"pruning": {"step": 2}}}}, OF_ONE | LABELS),
    # What a variant states for itself is not the run's to change.
    ({"saliency": {"reduction": "signed"}}, OF_OTHER | LABELS),
    ({"training": {"steps": 5}}, OF_ONE | OF_OTHER),
    # A third variant has the saliency of the first.
    (
        {"variants": {"no-rank": {"training": {"weights": {"rank": 0}}}}},
        {"variants/no-rank/train", "variants/no-rank/evaluate/sdtp-0.8", "ablation"},
    ),
    ({"evaluation": {"methods": ["random", "recent"]}}, {"evaluate/recent-0.8", "ablation"}),
    ({"evaluation": {"seeds": [0, 2]}}, {"evaluate/random-0.8", "ablation"}),
    (
        {"pruning": {"keep_ratios": [0.8, 0.5]}},
        SMALLER_RATIO,
    ),
    ({"training": {"gpus": 2}}, set()),
    ({"benchmark": {"repeats": 6}}, set()),
    ({"tracking": {"experiment": "other"}}, set()),
]


@pytest.mark.parametrize(("change", "jobs"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_changed_setting_reruns_the_variants_that_use_it(
    compared: Path, tmp_path: Path, change: dict[str, Any], jobs: set[str]
) -> None:
    assert due(compared, overlay(tmp_path / "changed.yaml", SMALL, change)) == jobs


def test_variant_left_out_or_in_another_order_reruns_the_table_alone(compared: Path, tmp_path: Path) -> None:
    small = {key: value for key, value in SMALL.items() if key != "variants"}
    for names in (["l2", "as-it-is"], ["l2"]):
        variants = {name: SMALL["variants"][name] for name in names}
        assert due(compared, overlay(tmp_path / "changed.yaml", small, {"variants": variants})) == {"ablation"}


def test_changed_variant_is_compared_with_what_the_other_had(compared: Path, tmp_path: Path) -> None:
    project = shutil.copytree(compared, tmp_path / "sdtp", symlinks=True)
    variants = project / "results" / "tiny" / "variants"
    before = {name: (variants / name / "pruner" / "pruner.json").stat().st_mtime_ns for name in SMALL["variants"]}
    config = overlay(project / "small.yaml", SMALL, {"variants": {"l2": {"training": {"width": 4}}}})
    snakemake(project, "ablation", "--configfile", config)
    after = {name: (variants / name / "pruner" / "pruner.json").stat().st_mtime_ns for name in SMALL["variants"]}
    assert after["as-it-is"] == before["as-it-is"]
    assert after["l2"] != before["l2"]
    assert due(project, config) == set()


@pytest.mark.parametrize(
    ("edited", "jobs"),
    [
        ("pipeline/ablation_plot.py", {"ablation"}),
        ("pipeline/report.py", set()),
        ("training/trainer.py", OF_ONE | OF_OTHER),
    ],
)
def test_edited_code_reruns_the_steps_it_decides(compared: Path, tmp_path: Path, edited: str, jobs: set[str]) -> None:
    project = shutil.copytree(compared, tmp_path / "sdtp", symlinks=True)
    with (project / "src" / "sdtp" / edited).open("a", encoding="utf-8") as file:
        file.write("\nEDITED = True\n")
    assert due(project, "small.yaml") == jobs
