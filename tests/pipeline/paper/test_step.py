"""The step `paper` on the files of a small made-up run, as the workflow calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import LlamaConfig

from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.paper.names import PARTS
from sdtp.pipeline.steps import paper
from tests.pipeline.paper.test_parts import compression, evaluation, score, scores, sweep_rows
from tests.pipeline.test_report_steps import folder as report_folder
from tests.workflow.golden import resolved

report_folder = report_folder  # a fixture

SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'
LAYERS = 12


@pytest.fixture
def run(report_folder: Path) -> Path:
    """results/<run> with what the other steps leave, beside the report's inputs."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=6
    )
    config.save_pretrained(report_folder / "model")
    manifest = json.loads((report_folder / "model" / "manifest.json").read_text())
    (report_folder / "model" / "manifest.json").write_text(json.dumps({**manifest, "context_length": 8192}))
    evaluations = {
        "unpruned": evaluation("unpruned", 1.0, [2.0, 3.0, 4.0]),
        "full": evaluation("sdtp", 0.9, [2.5, 3.5, 4.5]),
        "without-rank": evaluation("sdtp", 0.9, [2.75, 3.75, 4.75]),
        "without-rank-and-mse": evaluation("sdtp", 0.9, [3.0, 4.0, 5.0]),
    }
    for name, rows in evaluations.items():
        write_jsonl(report_folder / f"{name}.jsonl", rows)
    timed = pd.DataFrame(
        [("sdtp", 0.9, 512, 1.5, 1.2)],
        columns=["method", "keep_ratio", "timed_tokens", "prefill_speedup", "end_to_end_speedup"],
    )
    tables = {
        "ruler": scores("ruler"),
        "longbench": scores("longbench"),
        "harness": scores("harness").assign(chance=25.0),
        "stage-position": sweep_rows().replace({"layers": {"4 7": "4"}}),
        "stage-count": sweep_rows(),
        "cache-compression": compression(),
        "tradeoff": timed,
    }
    for name, table in tables.items():
        table.to_csv(report_folder / "tables" / f"{name}.csv", index=False)
    (report_folder / "figures").mkdir()
    for name in ("tradeoff", "ruler-heatmap"):
        (report_folder / "figures" / f"{name}.svg").write_text(SVG)
    return report_folder


def call(folder: Path, *more: str, ref: str = "mistralai/Mistral-7B-v0.1", **changes: Any) -> dict[str, pd.DataFrame]:
    """Runs the step; its tables."""
    settings = resolved("config.yaml")
    settings["model"]["source"] = {"kind": "hub", "ref": ref, "revision": None, "sha256": None}
    settings["pruning"]["step"] = 2
    for block in ("variants", "tracking"):
        del settings[block]
    arguments = {
        "settings": [json.dumps(settings)],
        "model": ["model"],
        "data": ["data"],
        "saliency": ["saliency/index.json"],
        "latency": ["tables/latency.csv"],
        "unpruned": ["unpruned.jsonl"],
        "full": ["full.jsonl"],
        "variants": ["without-rank.jsonl", "without-rank-and-mse.jsonl"],
        "figures": ["figures/tradeoff.svg", "figures/ruler-heatmap.svg"],
        "output": ["paper"],
        "metrics": ["metrics/paper.json"],
        **{name: [f"tables/{name}.csv"] for name in ("ruler", "harness", "stage-position", "stage-count", "tradeoff")},
        **changes,
    }
    argv = []
    for name, values in arguments.items():
        argv += [f"--{name}", *(value if name == "settings" else str(folder / value) for value in values)]
    paper.main([*argv, *more])
    return {name: pd.read_csv(folder / "paper" / f"{name}.csv") for name in PARTS}


def test_page_has_every_part_with_its_files(run: Path) -> None:
    tables = call(run, **{"cache-compression": ["tables/cache-compression.csv"]})
    html, markdown = (run / "paper" / "paper.html").read_text(), (run / "paper" / "paper.md").read_text()
    for name, title in PARTS.items():
        assert (run / "paper" / f"{name}.svg").read_text().startswith("<?xml")
        assert (run / "paper" / f"{name}.png").stat().st_size > 0
        assert f'id="{name}"' in html
        assert f"## {title}" in markdown
        assert len(tables[name]) > 0
    assert "Facts found, by their depth" in html
    assert (run / "paper" / "figure-4.csv").read_text().splitlines()[2].startswith("continuation,loss,sdtp,4,0.9,")
    metrics = json.loads((run / "metrics" / "paper.json").read_text())
    assert metrics["rows_not_run"] == sum(table["why"].notna().sum() for table in tables.values())
    assert metrics["rows"] == sum(table["why"].isna().sum() for table in tables.values())


def test_what_the_configuration_lacks_is_not_run_and_the_rest_is(run: Path) -> None:
    tables = call(run)
    left = {name: list(table["why"].dropna()) for name, table in tables.items()}
    assert [why[:24] for why in left["table-1"]] == ["LongBench's data are a d", "LLMLingua-2's weights ar"]
    assert len(left["table-3"]) == 8
    assert len(left["table-6"]) == 1
    # 4K fits into 8,192 positions and was not asked for.
    found = [why.partition(" and ")[0] for why in left["table-2"]]
    assert found[0].startswith("not among benchmark.prompt_tokens")
    assert found[1:] == ["8,192", "16,384", "32,768", "65,536", "131,072"]
    assert not any(left[name] for name in ("figure-1", "figure-2", "table-4", "table-5", "figure-4", "figure-5"))
    # The paper's numbers that nothing was run for stand there all the same.
    assert tables["table-2"]["prefill_speedup_paper"].notna().sum() == 6


def test_longbench_and_llmlingua_stand_where_they_were_run(run: Path) -> None:
    rows = [score("a", 100.0, 100), score("b", 50.0, 100)]
    write_jsonl(run / "whole.jsonl", rows)
    shortened = {"score": 25.0, "prompt_tokens": 50, "kept_tokens": 50}
    write_jsonl(run / "scores-0.9.jsonl", [{**row, **shortened} for row in rows])
    tables = call(
        run,
        longbench=["tables/longbench.csv"],
        **{"suite-scores": ["whole.jsonl"], "llmlingua": ["scores-0.9.jsonl"]},
    )
    table = tables["table-1"]
    assert table["why"].isna().all()
    average = table[(table["suite"] == "longbench") & (table["category"] == "average")].set_index("method")
    assert average.loc["sdtp", ["value", "value_paper", "compression_paper"]].tolist() == [41.0, 39.82, 1.61]
    found = table[(table["method"] == "llmlingua2") & (table["category"] == "average")].iloc[0]
    assert (found["suite"], found["keep_ratio"], found["value"], found["compression"]) == ("ruler", 0.9, 25.0, 2.0)


def test_compression_is_the_mean_of_the_layers_of_the_runs_schedule(run: Path) -> None:
    table = call(run)["table-1"].query("category == 'average' and suite == 'ruler'").set_index("method")
    # Stages before layers 4, 6, 8, 10 of 12, each keeping 0.9 of 1,024: 4 layers whole, then 2 each.
    kept = [round(0.9**stage * 1024) for stage in (1, 2, 3, 4)]
    assert table.loc["sdtp", "compression"] == pytest.approx(1024 * 12 / (4 * 1024 + 2 * sum(kept)))
    # Every second stage: before layers 4 and 8, four layers each.
    assert table.loc["sdtp-half", "compression"] == pytest.approx(1024 * 12 / (4 * 1024 + 4 * (kept[0] + kept[1])))
    assert table.loc["unpruned", "compression"] == 1.0
    assert table.loc["sdtp", "prefill_speedup"] == 1.5


def test_model_that_the_paper_does_not_have_has_none_of_its_numbers(run: Path) -> None:
    tables = call(run, ref="gpt2")
    assert not any(table.filter(like="_paper").notna().any(axis=None) for table in tables.values())
    assert "The paper does not have this model" in (run / "paper" / "paper.html").read_text()


def test_equal_inputs_give_equal_pages_and_figures(run: Path) -> None:
    call(run)
    names = ("paper.html", "paper.md", "table-2.svg", "table-1.png")
    first = [(run / "paper" / name).read_bytes() for name in names]
    call(run)
    assert [(run / "paper" / name).read_bytes() for name in names] == first
