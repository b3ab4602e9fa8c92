"""`snakemake paper`: what is planned for the shipped configurations, and what the tiny run gives."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from sdtp.pipeline.paper.names import ABLATIONS, PARTS
from tests.workflow.project import ROOT, copy_project, job_counts, overlay, snakemake

pytestmark = pytest.mark.slow

ENVIRONMENT = ROOT / ".venv-llmlingua"

# What the default run plans: everything beyond its own steps is of the paper.
DEFAULT = {
    "model": 1, "check": 1, "data": 1, "test_data": 1, "benchmark_text": 1, "saliency": 2, "saliency_index": 1,
    "train": 1, "benchmark": 3, "tables": 1,
    "evaluate": 32,  # unpruned, 4 methods and 6 peers at 3 ratios, and H2O on the unpruned model
    "reference": 1, "time_methods": 3, "time_compression": 1, "tradeoff_tables": 1, "tradeoff_suites": 1,
    "ruler_data": 1, "predict": 4, "score": 4, "ruler_table": 1,
    "sweep_train": 1, "sweep_evaluate": 36, "sweep_table": 1,  # 10 layers at 3 ratios, 7 counts, one of both
    "multiple_choice_data": 1, "harness_answers": 3, "harness_table": 1,
    "paper_train": 2, "paper_evaluate": 6, "paper": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("clone") / "sdtp")


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    # Planning asks no hub: with any other address it would fail.
    output = snakemake(folder, "paper", "--dry-run", *arguments, HF_ENDPOINT="http://127.0.0.1:9").stdout
    return job_counts(output)


def test_default_configuration_plans_every_part(clone: Path) -> None:
    assert planned(clone) == DEFAULT


def test_offline_configuration_plans_every_part(clone: Path) -> None:
    # 6 methods and 7 peers at 2 ratios, the unpruned model and H2O and SnapKV on it; 3 methods of the suites at 2.
    ratios = {
        "benchmark": 2, "evaluate": 29, "time_methods": 2, "paper_evaluate": 4, "harness_answers": 5, "predict": 7,
        "score": 7,
    }  # fmt: skip
    presses = {"budgets": 2, "kvpress": 4, "timed_budgets": 2, "kvpress_time": 4}
    assert planned(clone, "--configfile", "config/paper/smollm2-135m.yaml") == DEFAULT | ratios | presses


@pytest.mark.parametrize("name", ["qwen2-7b", "mistral-7b", "llama2-7b", "bloom-7b"])
def test_papers_models_plan_longbench_the_hubs_tasks_and_llmlingua(clone: Path, name: str) -> None:
    jobs = planned(clone, "--resources", "gpu=8", "--configfile", f"config/paper/{name}.yaml")
    assert {rule: jobs[rule] for rule in ("saliency", "paper_train", "paper_evaluate", "longbench_table", "paper")} == {
        "saliency": 8, "paper_train": 2, "paper_evaluate": 6, "longbench_table": 1, "paper": 1,
    }  # fmt: skip
    # Two suites at three ratios.
    assert {jobs[rule] for rule in ("suite_budgets", "llmlingua", "llmlingua_predict", "llmlingua_score")} == {6}
    assert {jobs[rule] for rule in ("timed_budgets", "llmlingua_time", "time_shortened")} == {3}


def test_page_shows_the_figures_of_each_suite_that_the_run_has(clone: Path) -> None:
    for arguments, shown in (((), False), (("--configfile", "config/paper/mistral-7b.yaml"), True)):
        output = snakemake(clone, "paper", "--dry-run", *arguments, HF_ENDPOINT="http://127.0.0.1:9").stdout
        [command] = [line for line in output.splitlines() if "/paper.log paper " in line]
        figures = command.partition(" --figures ")[2].partition(" --output ")[0].split()
        assert [Path(figure).stem for figure in figures] == [
            "tradeoff-suites", "tradeoff-suites-memory", "suite-ruler", "ruler-heatmap", *shown * ["suite-longbench"],
        ]  # fmt: skip


def test_ablations_have_the_runs_labels_and_a_weight_less(clone: Path) -> None:
    output = snakemake(clone, "paper", "--dry-run").stdout
    commands = [line for line in output.splitlines() if "sdtp --log logs/default/paper/variants/" in line]
    trained = [line for line in commands if " train " in line]
    assert len(trained) == len(ABLATIONS)
    assert all("--saliency results/default/saliency/index.json" in line for line in trained)
    weights = {line.partition("paper/variants/")[2].partition("/")[0]: line for line in trained}
    assert '"mse":0.1,"rank":0.0' in weights["without-rank"]
    assert '"mse":0.0,"rank":0.0' in weights["without-rank-and-mse"]


def test_change_of_the_papers_settings_changes_nothing_of_the_run(clone: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_text("paper: {llmlingua: some/xlm-roberta-large}\n", encoding="utf-8")
    assert job_counts(snakemake(clone, "--dry-run", "--configfile", str(path)).stdout) == job_counts(
        snakemake(clone, "--dry-run").stdout
    )


SMALL: dict[str, Any] = {
    "pruning": {"keep_ratios": [0.5]},
    "peers": {"methods": ["sdtp+h2o", "sdtp-half"], "layer": 2, "prompt_tokens": [64]},
    "suites": {
        "methods": ["sdtp", "sdtp-half"],
        "keep_ratios": [0.5],
        "ruler": {"tasks": ["single", "multi_key"], "lengths": [256], "examples": 2, "depths": [0.1, 0.9]},
    },
    "sweep": {"layers": [1, 2], "layer_ratios": [0.8], "counts": [1, 2], "count_ratios": [0.8], "examples": 2},
    "harness": {
        "methods": ["sdtp"],
        "keep_ratios": [0.5],
        "fewshot": 1,
        "tasks": ["sdtp_fact"],
        "local": {"questions": 4},
    },
}


@pytest.fixture(scope="module")
def made(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished tiny run in which `snakemake paper` ran. Not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("paper") / "sdtp", symlinks=True)
    snakemake(folder, "paper", "--configfile", overlay(folder / "paper.yaml", SMALL))
    return folder


def test_every_part_is_there_as_table_figure_and_section(made: Path) -> None:
    folder = made / "results" / "tiny" / "paper"
    html, markdown = (folder / "paper.html").read_text("utf-8"), (folder / "paper.md").read_text("utf-8")
    for name, title in PARTS.items():
        assert len(pd.read_csv(folder / f"{name}.csv")) > 0
        assert (folder / f"{name}.svg").read_text("utf-8").startswith("<?xml")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'id="{name}"' in html
        assert f"## {title}" in markdown
    assert "http://" not in html
    assert "https://" not in html


def test_tables_hold_what_the_other_steps_measured(made: Path) -> None:
    results = made / "results" / "tiny"
    parts = {name: pd.read_csv(results / "paper" / f"{name}.csv") for name in PARTS}
    latency = pd.read_csv(results / "tables" / "latency.csv")
    timed = parts["table-2"][parts["table-2"]["why"].isna()]
    assert sorted(timed["prefill_speedup"]) == sorted(latency["prefill_speedup"])
    assert set(parts["table-2"]["prompt_tokens"]) >= {64, 128, 4096, 131072}
    ruler = pd.read_csv(results / "tables" / "ruler.csv")
    whole = ruler[(ruler["task"] == "all") & ruler["length"].isna()]
    scored = parts["table-1"][parts["table-1"]["why"].isna()]
    assert sorted(scored["value"]) == sorted(whole["value"])
    # What needs a download says so.
    left = parts["table-1"][parts["table-1"]["why"].notna()]
    # Six categories and their average, of the unpruned model and two methods.
    assert list(left["suite"]) == 22 * ["longbench"] + ["ruler"]
    assert list(left["method"]) == 7 * ["unpruned", "sdtp", "sdtp-half"] + 2 * ["llmlingua2"]
    assert parts["table-3"]["why"].notna().sum() == 8
    assert {"unpruned", "sdtp"} == set(parts["table-3"].loc[parts["table-3"]["why"].isna(), "method"])
    for name, variant in zip(("table-4", "table-5"), ABLATIONS, strict=True):
        path = results / "paper" / "variants" / variant / "evaluation" / "sdtp-0.5.jsonl"
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        losses = [row["loss"] for row in rows if row["task"] == "continuation"]
        table = parts[name]
        cell = table[(table["variant"] == variant) & (table["task"] == "continuation")].iloc[0]
        assert cell["value"] == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert {"sdtp", "sdtp+h2o"} <= set(parts["table-6"]["method"])
    index = json.loads((results / "saliency" / "index.json").read_text("utf-8"))
    assert list(parts["figure-2"]["layer"]) == index["layers"]
    assert set(parts["figure-2"]["n"]) == {len(index["examples"])}
    assert set(parts["figure-4"]["layers"].dropna()) == {1, 2}
    assert set(parts["figure-5"]["stages"].dropna()) == {1, 2}


def test_nothing_is_left_to_do_afterwards(made: Path) -> None:
    assert job_counts(snakemake(made, "paper", "--dry-run", "--configfile", "paper.yaml").stdout) == {}


def test_llmlingua_without_its_environment_says_what_makes_it(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "sdtp", symlinks=True)
    config = yaml.safe_load((folder / "paper.yaml").read_text(encoding="utf-8"))
    config["paper"] = {"llmlingua": "some/xlm-roberta-large"}
    (folder / "weights.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    process = snakemake(folder, "paper", "--configfile", "weights.yaml", check=False)
    assert process.returncode != 0
    assert "LLMLingua-2 has an environment of its own, which is not there yet: make llmlingua" in process.stdout
    assert "steps (" not in process.stdout  # before any job is done


@pytest.mark.skipif(not ENVIRONMENT.exists(), reason="the environment of LLMLingua-2 is not there: make llmlingua")
def test_llmlingua_stands_in_the_table_with_its_compression(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "sdtp", symlinks=True)
    (folder / ".venv-llmlingua").symlink_to(ENVIRONMENT)
    weights = folder / "tiny-xlm-roberta-large"
    script = Path(__file__).with_name("tiny_llmlingua.py")
    subprocess.run([ENVIRONMENT / "bin" / "python", script, weights], check=True, capture_output=True)
    config = yaml.safe_load((folder / "paper.yaml").read_text(encoding="utf-8"))
    config["paper"] = {"llmlingua": weights.name}
    (folder / "weights.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    output = snakemake(folder, "paper", "--configfile", "weights.yaml").stdout
    assert job_counts(output) == {
        "suite_budgets": 1, "llmlingua": 1, "llmlingua_predict": 1, "llmlingua_score": 1,
        "timed_budgets": 1, "llmlingua_time": 1, "time_shortened": 1, "paper": 1,
    }  # fmt: skip
    table = pd.read_csv(folder / "results" / "tiny" / "paper" / "table-1.csv")
    found = table[(table["method"] == "llmlingua2") & (table["category"] == "average")].iloc[0]
    assert found["keep_ratio"] == 0.5
    assert found["compression"] == found["last_compression"] > 1.5
    # The tiny model is faster than what shortens its prompts.
    assert 0 < found["prefill_speedup"] < 1
    assert found["shortening_s"] > 0
    assert not pd.isna(found["emptied"])
    [speed] = json.loads((folder / "results" / "tiny" / "llmlingua" / "speed-0.5.json").read_text("utf-8"))["rows"][
        1::2
    ]
    assert len(speed["shortening_s"]) == len(speed["prefill_s"]) == 5
    assert list(table.loc[table["why"].notna(), "suite"]) == 21 * ["longbench"]
