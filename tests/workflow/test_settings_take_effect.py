"""The finished tiny run did what its settings say: each file's own keep ratio, both seeds, memory and cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from snakemake.utils import update_config
from transformers import AutoConfig

from sdtp.pruning import flops
from sdtp.pruning.schedule import PruningSchedule
from tests.workflow.project import ROOT, TINY

pytestmark = pytest.mark.slow

# Training's own keep ratio is the first: a step that took the trained pruner's schedule would be right there alone.
RATIOS = ["0.8", "0.5"]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The default configuration with the tiny one over it."""
    merged = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    update_config(merged, yaml.safe_load(TINY.read_text(encoding="utf-8")))
    assert [str(ratio) for ratio in merged["pruning"]["keep_ratios"]] == RATIOS
    return merged


@pytest.fixture(scope="module")
def results(finished_run: Path) -> Path:
    return finished_run / "results" / "tiny"


def schedule(config: dict[str, Any], results: Path, ratio: str) -> PruningSchedule:
    """The schedule that the configuration describes."""
    pruning = config["pruning"]
    protected = {name: pruning[name] for name in ("sinks", "local", "min_local")}
    layers = AutoConfig.from_pretrained(results / "model").num_hidden_layers
    return PruningSchedule.geometric(layers, pruning["start"], pruning["step"], float(ratio), **protected)


def rows(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", ["sdtp", "random"])
def test_evaluations_keep_what_their_ratio_says(config: dict[str, Any], results: Path, method: str, ratio: str) -> None:
    expected = schedule(config, results, ratio)
    evaluated = rows(results / "evaluation" / f"{method}-{ratio}.jsonl")
    for row in evaluated:
        assert row["kept_tokens"] == expected.surviving(row["prompt_tokens"])[-1]
    examples = config["data"]["test"]["examples"]
    seeds = len(config["evaluation"]["seeds"]) if method == "random" else 1
    assert [row["task"] for row in evaluated].count("retrieval") == examples * seeds
    assert [row["task"] for row in evaluated].count("continuation") == examples * seeds


def test_the_unpruned_evaluation_keeps_all(results: Path) -> None:
    evaluated = rows(results / "evaluation" / "unpruned-1.0.jsonl")
    assert [row["kept_tokens"] for row in evaluated] == [row["prompt_tokens"] for row in evaluated]


@pytest.mark.parametrize("ratio", RATIOS)
def test_random_runs_with_every_seed_and_each_chooses_otherwise(
    config: dict[str, Any], results: Path, ratio: str
) -> None:
    assert config["evaluation"]["seeds"] == [0, 1]
    losses: dict[int, dict[str, tuple[float, float]]] = {}
    for row in rows(results / "evaluation" / f"random-{ratio}.jsonl"):
        losses.setdefault(row["seed"], {})[row["id"]] = row["loss"], row["kl"]
    assert list(losses) == [0, 1]
    assert losses[0].keys() == losses[1].keys()
    for example, (loss, kl) in losses[0].items():
        # The same survivors give the same numbers, or rounding; two losses can be alike by chance, and not the KL too.
        assert abs(loss - losses[1][example][0]) > 1e-5 or abs(kl - losses[1][example][1]) > 1e-5


@pytest.mark.parametrize("ratio", RATIOS)
def test_generations_keep_what_their_ratio_says_at_every_stage(
    config: dict[str, Any], results: Path, ratio: str
) -> None:
    expected = schedule(config, results, ratio)
    generated = rows(results / "generations" / f"ratio-{ratio}.jsonl")
    assert len(generated) == config["generation"]["examples"]
    for row in generated:
        assert [len(kept) for kept in row["kept"]] == expected.surviving(row["prompt_tokens"])
        before = set(range(row["prompt_tokens"]))
        for kept in row["kept"]:
            assert kept == sorted(set(kept) & before)
            before = set(kept)


@pytest.mark.parametrize("ratio", RATIOS)
def test_benchmarks_keep_cache_and_measure_what_their_ratio_says(
    config: dict[str, Any], results: Path, ratio: str
) -> None:
    expected = schedule(config, results, ratio)
    model = AutoConfig.from_pretrained(results / "model")
    timings = json.loads((results / "benchmark" / f"ratio-{ratio}.json").read_text(encoding="utf-8"))
    value_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[timings["dtype"]]
    lengths = config["benchmark"]["prompt_tokens"]
    assert [(row["method"], row["prompt_tokens"]) for row in timings["rows"]] == [
        (method, length) for length in lengths for method in ("unpruned", "sdtp")
    ]
    for row in timings["rows"]:
        length, pruned = row["prompt_tokens"], row["method"] == "sdtp"
        assert row["kept_tokens"] == (expected.surviving(length)[-1] if pruned else length)
        assert row["kv_cache_bytes"] == flops.cache_bytes(model, length, expected if pruned else None, value_bytes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no procfs to read peak memory from")
@pytest.mark.parametrize("ratio", RATIOS)
def test_benchmarks_measure_memory_that_holds_the_weights(results: Path, ratio: str) -> None:
    weights = 0
    for path in (results / "model").glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            weights += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert weights > 100_000
    for row in json.loads((results / "benchmark" / f"ratio-{ratio}.json").read_text(encoding="utf-8"))["rows"]:
        assert len(row["peak_memory_bytes"]) == 3
        assert min(row["peak_memory_bytes"]) > weights
