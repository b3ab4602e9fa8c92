"""The step `paper` on the files of a small made-up run, as the workflow calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoConfig, BloomConfig, GPTNeoXConfig, LlamaConfig, OPTConfig, Phi3Config, PretrainedConfig

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.paper.names import PARTS
from sdtp.pipeline.steps import paper
from tests.pipeline.paper.test_parts import compression, evaluation, harness, score, scores, sweep_rows
from tests.pipeline.test_report_steps import folder as report_folder
from tests.workflow.golden import resolved

report_folder = report_folder  # a fixture

SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'
LAYERS = 12
# Scores of the unpruned model, of each suite's one category.
WHOLE = [
    *(score("r", 50.0, tokens, category="qa") for tokens in (100, 1000)),
    score("l", 50.0, 7000, suite="longbench", category="qa", task="hotpotqa"),
]


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
    for name, updates in (("full", 640), ("without-rank", 640), ("without-rank-and-mse", 0)):
        counted = {"label_updates": updates, "optimizer_steps": 8, "kept_step": 8}
        (report_folder / f"{name}.json").write_text(json.dumps(counted))
    write_jsonl(report_folder / "whole.jsonl", WHOLE)
    timed = pd.DataFrame(
        [("sdtp", 0.9, 512, 1.5, 1.2)],
        columns=["method", "keep_ratio", "timed_tokens", "prefill_speedup", "end_to_end_speedup"],
    )
    tables = {
        "ruler": scores("ruler"),
        "longbench": scores("longbench"),
        "harness": harness(),
        "stage-position": sweep_rows().replace({"layers": {"4 7": "4"}}),
        "stage-count": sweep_rows(),
        "cache-compression": compression(),
        "tradeoff": timed,
    }
    for name, table in tables.items():
        table.to_csv(report_folder / "tables" / f"{name}.csv", index=False)
    (report_folder / "figures").mkdir()
    for name in ("tradeoff-suites", "ruler-heatmap", "suite-longbench"):
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
        "training": ["full.json", "without-rank.json", "without-rank-and-mse.json"],
        "suite-scores": ["whole.jsonl"],
        "figures": [f"figures/{name}.svg" for name in ("tradeoff-suites", "ruler-heatmap", "suite-longbench")],
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
    assert "LongBench, task by task" in html
    # No press of kvpress is named.
    assert "`make kvpress && echo" in markdown
    assert (run / "paper" / "figure-4.csv").read_text().splitlines()[2].startswith("continuation,loss,sdtp,4,0.9,")
    metrics = json.loads((run / "metrics" / "paper.json").read_text())
    assert metrics["rows_not_run"] == sum(table["why"].notna().sum() for table in tables.values())
    assert metrics["rows"] == sum(table["why"].isna().sum() for table in tables.values())


def test_what_the_configuration_lacks_is_not_run_and_the_rest_is(run: Path) -> None:
    tables = call(run)
    left = {name: list(table["why"].dropna()) for name, table in tables.items()}
    # Six categories and their average, of the unpruned model and two methods at one keep ratio.
    assert [why[:24] for why in left["table-1"]] == 21 * ["LongBench's data are a d"] + 2 * ["LLMLingua-2's weights ar"]
    assert len(left["table-3"]) == 8
    assert len(left["table-6"]) == 1
    assert left["table-6"][0].startswith("peers.methods has no rule on top")
    # 4K fits into 8,192 positions and was not asked for; 8K does with the new tokens taken off.
    assert [why.startswith("not among benchmark.prompt_tokens") for why in left["table-2"]] == 2 * [True] + 4 * [False]
    assert "; 8,176 counts, the longest that 16 new tokens leave of 8,192 positions" in left["table-2"][1]
    assert not any(left[name] for name in ("figure-1", "figure-2", "table-4", "table-5", "figure-4", "figure-5"))
    # The paper's numbers that nothing was run for stand there all the same.
    assert tables["table-2"]["prefill_speedup_paper"].notna().sum() == 6


def test_longbench_and_llmlingua_stand_where_they_were_run(run: Path) -> None:
    rows = [score(id_, 50.0, 100, category="qa") for id_ in ("a", "b", "c")]
    write_jsonl(run / "whole.jsonl", [*rows, WHOLE[-1]])
    # Of the first one's context nothing is left, of the second's ten tokens; the third had none.
    left = [(40, [20, 20]), (60, [25, 35]), (100, [5, 5])]
    shortened = [
        {**row, "score": 25.0, "prompt_tokens": n, "kept_tokens": n} for row, (n, _) in zip(rows, left, strict=True)
    ]
    write_jsonl(run / "scores-0.9.jsonl", shortened)
    prompts = [{**row, "prompt_ids": [1] * n, "context": context} for row, (n, context) in zip(rows, left, strict=True)]
    write_jsonl(run / "examples-0.9.jsonl", prompts)
    times = {"prompt_tokens": 512, "prefill_s": [2.0], "end_to_end_s": [3.0]}
    own = {**times, "method": "llmlingua2", "prefill_s": [0.5], "end_to_end_s": [1.5], "shortening_s": [0.5]}
    speeds = {"keep_ratio": 0.9, "rows": [{**times, "method": "unpruned"}, own]}
    (run / "speed-0.9.json").write_text(json.dumps(speeds))
    tables = call(
        run,
        longbench=["tables/longbench.csv"],
        llmlingua=["scores-0.9.jsonl"],
        **{"llmlingua-examples": ["examples-0.9.jsonl"]},
        **{"llmlingua-speeds": ["speed-0.9.json"]},
    )
    table = tables["table-1"]
    assert table["why"].isna().all()
    average = table[(table["suite"] == "longbench") & (table["category"] == "average")].set_index("method")
    assert average.loc["sdtp", ["value", "value_paper", "compression_paper"]].tolist() == [41.0, 39.82, 1.61]
    found = table[(table["method"] == "llmlingua2") & (table["category"] == "average")].iloc[0]
    assert (found["suite"], found["keep_ratio"], found["value"], found["compression"]) == ("ruler", 0.9, 25.0, 1.5)
    assert (found["prefill_speedup"], found["end_to_end_speedup"], found["shortening_s"]) == (2.0, 1.5, 0.5)
    assert found["timed_tokens"] == 512
    assert found["emptied"] == 1
    assert "LongBench's prompts have this project's own wording here" in (run / "paper" / "paper.md").read_text()
    pruned = table[(table["method"] == "sdtp") & (table["category"] == "average")].iloc[0]
    assert pd.isna(pruned["shortening_s"])


def test_compression_is_the_mean_of_the_layers_of_the_runs_schedule(run: Path) -> None:
    others = [scores("ruler").query("method == 'sdtp'").assign(method=method) for method in ("recent", "gemfilter")]
    pd.concat([scores("ruler"), *others]).to_csv(run / "tables" / "ruler.csv", index=False)
    table = call(run)["table-1"].query("category == 'average' and suite == 'ruler'").set_index("method")
    # Stages before layers 4, 6, 8, 10 of 12, each keeping 0.9 of what is left of 100 and of 1,000: 4 layers whole, 2
    # layers each after.
    kept = [round(0.9**stage * 100) + round(0.9**stage * 1000) for stage in (1, 2, 3, 4)]
    assert table.loc["sdtp", "compression"] == pytest.approx(1100 * 12 / (4 * 1100 + 2 * sum(kept)))
    # Every second stage: before layers 4 and 8, four layers each.
    assert table.loc["sdtp-half", "compression"] == pytest.approx(1100 * 12 / (4 * 1100 + 4 * (kept[0] + kept[1])))
    assert table.loc["unpruned", "compression"] == 1.0
    # The same stages keep as many, whatever chooses; GemFilter has none.
    assert table.loc["recent", "compression"] == table.loc["sdtp", "compression"]
    assert pd.isna(table.loc["gemfilter", "compression"])
    assert table.loc["sdtp", ["prefill_speedup", "timed_tokens", "prompt_tokens"]].tolist() == [1.5, 512, 550]


def test_longbench_is_compressed_at_its_own_lengths(run: Path) -> None:
    table = call(run, longbench=["tables/longbench.csv"])["table-1"].query("category == 'average'")
    found = table.set_index(["suite", "method"])["compression"]
    kept = [round(0.9**stage * 7000) for stage in (1, 2, 3, 4)]
    assert found["longbench", "sdtp"] == pytest.approx(7000 * 12 / (4 * 7000 + 2 * sum(kept)))
    assert found["ruler", "sdtp"] != found["longbench", "sdtp"]


def test_updates_of_each_pruner_stand_beside_its_quality(run: Path) -> None:
    tables = call(run)
    for name, updates in (("table-4", [640, 640]), ("table-5", [640, 0])):
        rows = tables[name].query("metric == 'loss' and variant != 'unpruned'")
        assert rows["label_updates"].tolist() == updates
        assert rows["optimizer_steps"].tolist() == [8, 8]
    assert "the fit falls away with them" in (run / "paper" / "paper.md").read_text()


def test_model_that_no_rule_attaches_to_is_told_in_the_rules_own_words(run: Path) -> None:
    BloomConfig(hidden_size=32, n_layer=LAYERS, n_head=4, vocab_size=6).save_pretrained(run / "model")
    [why] = call(run)["table-6"]["why"]
    assert why.startswith("BloomForCausalLM is not supported by peers: its positions are ALiBi biases; ")


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 6, "pad_token_id": 0}


UNREADABLE = "H2O reads attention as LastQuery does. LastQuery is not supported with layer 0's "


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Phi3Config(**TINY), f"{UNREADABLE}Phi3Attention: it has no q_proj, head_dim and scaling"),
        (GPTNeoXConfig(**TINY), f"{UNREADABLE}GPTNeoXAttention: it has no q_proj, head_dim and scaling"),
        (OPTConfig(**TINY, word_embed_proj_dim=32), f"{UNREADABLE}OPTAttention: its positions are not rotary"),
        (LlamaConfig(**TINY), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_model_whose_attention_no_rule_can_read_is_refused_as_the_rules_refuse_it(
    config: PretrainedConfig, reason: str | None
) -> None:
    settings = Settings.from_mapping({"model": {"trust_remote_code": False}, "peers": {"cache_keep": 0.4}})
    assert paper.refusal(config, settings) == reason


def test_models_own_code_may_run_where_it_was_fetched_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((run / "model" / "manifest.json").read_text())
    (run / "model" / "manifest.json").write_text(json.dumps({**manifest, "trust_remote_code": True}))
    trusted = []

    def stop(folder: str, **options: Any) -> None:
        trusted.append(options.get("trust_remote_code"))
        raise OSError("asked for it")

    monkeypatch.setattr(AutoConfig, "from_pretrained", stop)
    with pytest.raises(UserError, match=r"config\.json: asked for it"):
        call(run)
    assert trusted == [True]


def test_commands_name_the_files_that_the_run_was_given(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTP_CONFIGURED", json.dumps({"files": ["config/own.yaml"], "overrides": {"seed": 7}}))
    tables = call(run)
    commands = [command for table in tables.values() for command in table["command"].dropna()]
    assert len(commands) == 23 + 6 + 8 + 1
    for command in commands:
        assert "{seed: 7, " in command
        assert " --configfile config/own.yaml results/" in command


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
