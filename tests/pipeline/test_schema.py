"""The schema fills, converts and refuses; what it refuses, it explains."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.evaluation.names import BASELINES
from sdtp.pipeline.schema import check_sources, leaves, resolve, resolve_variants
from sdtp.pipeline.schema_words import accepted
from tests.workflow.golden import SCHEMA

HUB = {"kind": "hub", "ref": "a/b", "revision": None, "sha256": None}


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({"seed": "a"}, ['seed = "a": must be a whole number ≥ 0 and ≤ 4294967295']),
        ({"seed": True}, ["seed = true: must be a whole number ≥ 0 and ≤ 4294967295"]),
        ({"seed": 0.5}, ["seed = 0.5: must be a whole number ≥ 0 and ≤ 4294967295"]),
        ({"seed": -1}, ["seed = -1: must be a whole number ≥ 0 and ≤ 4294967295"]),
        ({"run": "a/b"}, [f'run = "a/b": must be text matching `{SCHEMA["properties"]["run"]["pattern"]}`']),
        ({"training": None}, ["training = null: must be a block of keys"]),
        ({"training": {"steps": 0}}, ["training.steps = 0: must be a whole number ≥ 1"]),
        ({"training": {"keep_ratio": 1.0}}, ["training.keep_ratio = 1.0: must be a number > 0 and < 1"]),
        (
            {"training": {"learning_rate": "1e-3"}},
            ['training.learning_rate = "1e-3": must be a number > 0 (YAML reads 1e-3 as text; write 0.001)'],
        ),
        (
            {"pruning": {"start": "3"}},
            [
                'pruning.start = "3": must be a whole number ≥ 1 (text, not a number: no quotes in a '
                "file; --config takes no numbers inside a block, use --configfile)"
            ],
        ),
        ({"pruning": {"keep_ratios": [0.9, math.nan]}}, ["pruning.keep_ratios = [0.9, NaN]: must be finite"]),
        (
            {"pruning": {"keep_ratios": []}},
            ["pruning.keep_ratios = []: must be a list of at least 1 distinct values, each a number > 0 and ≤ 1"],
        ),
        ({"tracking": {"experiment": ""}}, ['tracking.experiment = "": must be text of at least 1 character']),
        (
            {"run": "mlflow.db"},
            [f'run = "mlflow.db": must be text matching `{SCHEMA["properties"]["run"]["pattern"]}`'],
        ),
        (
            {3: 1, "colour": 1},
            [f"{key} = 1: no such key; the config has {', '.join(SCHEMA['properties'])}" for key in (3, "colour")],
        ),
        ({"pruning": {"start": 0}}, ["pruning.start = 0: must be a whole number ≥ 1"]),
        ({"pruning": {"local": math.nan}}, ["pruning.local = NaN: must be finite"]),
        ({"training": {"weights": {"ce": math.inf}}}, ["training.weights.ce = Infinity: must be finite"]),
        ({"pruning": {"keep_ratios": [0.9, 1.5]}}, ["pruning.keep_ratios.1 = 1.5: must be a number > 0 and ≤ 1"]),
        (
            {"pruning": {"keep_ratios": [0.9, 0.9]}},
            [
                "pruning.keep_ratios = [0.9, 0.9]: must be a list of at least 1 distinct values, "
                "each a number > 0 and ≤ 1"
            ],
        ),
        (
            {"training": {"question_rank": 5}},
            ["training.question_rank = 5: must be a whole number ≥ 0, a multiple of 8"],
        ),
        ({"benchmark": {"repeats": 4}}, ["benchmark.repeats = 4: must be a whole number ≥ 5"]),
        (
            {"training": {"gpus": 5}},  # beside the default batch
            ["training.batch_size = 4: must be at least training.gpus = 5, or GPUs are idle in every step"],
        ),
        ({"training": {"gpus": 5, "batch_size": 0}}, ["training.batch_size = 0: must be a whole number ≥ 1"]),
        ({"model": {"dtype": "fp16"}}, ['model.dtype = "fp16": must be one of auto, float32, bfloat16, float16']),
        (
            {"evaluation": {"methods": ["unpruned"]}},
            [f'evaluation.methods.0 = "unpruned": must be one of sdtp, sdtp-tuned, {", ".join(BASELINES)}, oracle'],
        ),
        (
            {"model": {"source": HUB | {"sha256": "ABC"}}},
            ['model.source.sha256 = "ABC": must be text or null matching `^[0-9a-f]{64}$`'],
        ),
        (
            {"data": {"train": {"source": {"kind": "s3", "ref": "x", "revision": None, "sha256": None}}}},
            ['data.train.source.kind = "s3": must be one of hub, local, jsonl, package'],
        ),
        (
            {"tracing": {}, "training": {"stepz": 3, "steps": 0}},
            [
                f"tracing = {{}}: no such key; the config has {', '.join(SCHEMA['properties'])}",
                "training.steps = 0: must be a whole number ≥ 1",
                "training.stepz = 3: no such key; training has gpus, keep_ratio, label_epochs, label_examples, steps, "
                "batch_size, learning_rate, width, position, question_rank, neighbours, recency, temperature, sampler, "
                "weights, evaluate_every, checkpoint_every, patience, autocast, gradient_checkpointing, shard_model",
            ],
        ),
    ],
)
def test_fault_names_key_value_and_what_is_accepted(config: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        resolve(config, SCHEMA)
    assert str(raised.value).splitlines() == ["the configuration is not valid:", *(f"  {line}" for line in lines)]


def test_a_batch_of_one_example_a_gpu_is_enough() -> None:
    training = {"gpus": 8, "batch_size": 8}
    assert resolve({"training": training}, SCHEMA)["training"]["batch_size"] == 8
    with pytest.raises(
        UserError, match=r"variants\.more\.training\.batch_size = 8: must be at least training\.gpus = 9"
    ):
        resolve_variants(
            resolve({"training": training, "variants": {"more": {"training": {"gpus": 9}}}}, SCHEMA), SCHEMA
        )


@pytest.mark.parametrize("block", ["evaluation", "peers", "suites", "harness"])
def test_a_tuned_schedule_needs_examples_to_choose_and_others_to_report(block: str) -> None:
    few, enough = ({"data": {"train": {"heldout": count}}} for count in (11, 12))
    tuned = {block: {"methods": ["sdtp-tuned"]}}
    with pytest.raises(UserError) as raised:
        resolve(few | tuned, SCHEMA)
    assert str(raised.value).splitlines()[1:] == [
        "  data.train.heldout = 11: method sdtp-tuned needs 12 or more, because half of them choose and fewer than 6 "
        "others can show no difference"
    ]
    assert resolve(enough | tuned, SCHEMA)[block]["methods"] == ["sdtp-tuned"]
    assert resolve(few, SCHEMA)["data"]["train"]["heldout"] == 11


def test_numbers_get_the_type_the_schema_gives_them() -> None:
    config = resolve({"training": {"steps": 60.0, "temperature": 2}, "pruning": {"keep_ratios": [1]}}, SCHEMA)
    assert [repr(config["training"][key]) for key in ("steps", "temperature")] == ["60", "2.0"]
    assert repr(config["pruning"]["keep_ratios"]) == "[1.0]"


def test_source_that_may_be_null_is_null_or_whole() -> None:
    assert resolve({}, SCHEMA)["suites"]["longbench"]["source"] is None
    reordered = dict(reversed(HUB.items()))
    found = resolve({"suites": {"longbench": {"source": reordered, "examples": 5.0}}}, SCHEMA)["suites"]["longbench"]
    assert list(found["source"].items()) == list(HUB.items())
    assert type(found["examples"]) is int
    for source, fault in (
        (HUB | {"kind": "jsonl"}, '.kind = "jsonl": must be one of hub, local'),
        ({"kind": "hub", "ref": "a/b", "revision": None}, "needs the key sha256"),
        (5, " = 5: must be a block of keys or null"),
    ):
        with pytest.raises(UserError, match=rf"suites\.longbench\.source.*{fault}"):
            resolve({"suites": {"longbench": {"source": source}}}, SCHEMA)
    with pytest.raises(UserError, match=r"suites\.longbench\.source = .*: also needs revision, sha256"):
        check_sources({"suites": {"longbench": {"source": {"kind": "hub", "ref": "a/b"}}}}, SCHEMA)
    check_sources({"suites": {"longbench": {"source": None}}}, SCHEMA)


def test_defaults_are_filled_beside_what_is_stated() -> None:
    config = resolve({"training": {"weights": {"mse": 0}}}, SCHEMA)
    assert config["training"]["weights"] == {"ce": 0.0, "kl": 1.0, "mse": 0.0, "rank": 0.1}
    assert config["training"]["steps"] == 8


def test_resolving_changes_neither_its_input_nor_the_schema() -> None:
    config: dict[str, Any] = {"training": {}}
    resolve(config, SCHEMA)["pruning"]["keep_ratios"].append(0.1)
    assert config == {"training": {}}
    assert resolve({}, SCHEMA)["pruning"]["keep_ratios"] == [0.9, 0.8, 0.7]


def variants(**changes: Any) -> dict[str, dict[str, Any]]:
    """The configurations of variants of the default run."""
    return resolve_variants(resolve({"variants": changes}, SCHEMA), SCHEMA)


def test_variant_is_the_run_with_its_changes_laid_over() -> None:
    run = resolve({"run": "mine", "training": {"weights": {"mse": 0.5}}}, SCHEMA)
    run["variants"] = {"b": {"training": {"weights": {"rank": 0}}, "pruning": {"start": 7.0}}, "a": {}}
    resolved = resolve_variants(run, SCHEMA)
    assert list(resolved) == ["b", "a"]  # the first is what others are compared with
    del run["variants"]
    assert resolved["a"] == run
    assert resolved["b"]["training"]["weights"] == run["training"]["weights"] | {"rank": 0.0}
    assert run["training"]["weights"]["mse"] == 0.5
    assert repr(resolved["b"]["training"]["weights"]["rank"]) == "0.0"
    assert repr(resolved["b"]["pruning"]["start"]) == "7"
    assert resolved["b"]["saliency"] == run["saliency"]
    assert run["training"]["weights"]["rank"] == 0.1


def test_no_variants_are_no_configurations() -> None:
    assert resolve({}, SCHEMA)["variants"] == {}
    assert variants() == {}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"a": {"saliency": {"reduction": "max"}}}, ['a.saliency.reduction = "max": must be one of abs, signed, l2']),
        ({"a": {"training": {"steps": "60"}}}, ['a.training.steps = "60": must be a whole number ≥ 1']),
        ({"a": {"training": {"temperature": float("inf")}}}, ["a.training.temperature = Infinity: must be finite"]),
        ({"a": {"saliency": {"rediction": "abs"}}}, ['a.saliency.rediction = "abs": no such key; saliency has shards']),
        ({"a": {"training": 3}, "b": {}}, ["a.training = 3: must be a block of keys"]),
        ({"a": {"model": {"dtype": "auto"}}}, ['a.model = {"dtype": "auto"}: the variants share this']),
        ({"a": {"data": {}, "seed": 3}}, ["a.data = {}: the variants share this", "a.seed = 3: the variants share"]),
        ({"a": {"evaluation": {"seeds": [1]}}}, ['a.evaluation = {"seeds": [1]}: the variants share this']),
        ({"a": {"variants": {}}}, ["a.variants = {}: the variants share this"]),
        ({"a": {"pruning": {"keep_ratios": [0.5]}}}, ["a.pruning.keep_ratios = [0.5]: the variants share this"]),
        ({"a": {"saliency": {"shards": 3}}}, ["a.saliency.shards = 3: the variants share this"]),
        (
            {"a": {"steps": 3}},
            ["a.steps = 3: the variants share this; a variant may change pruning, saliency,"],
        ),
        ({"a/b": {}}, ["a/b = {}: the name must match"]),
        ({"..": {}}, [".. = {}: the name must match"]),
    ],
)
def test_fault_of_a_variant_names_it_and_the_key(changes: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        variants(**changes)
    found = str(raised.value).splitlines()[1:]
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(f"  variants.{expected}")


def test_variant_that_is_no_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"variants\.full = null: must be a block of keys"):
        variants(full=None)


def test_name_that_yaml_reads_as_a_number_is_a_name() -> None:
    resolved = resolve_variants(resolve({"variants": {1: {}}}, SCHEMA), SCHEMA)
    assert list(resolved) == ["1"]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"model": {"source": {"ref": "a/b"}}}, r'model\.source = {"ref": "a/b"}: also needs kind, revision, sha256;'),
        ({"data": {"test": {"source": HUB}, "train": {"source": {}}}}, r"data\.train\.source = {}"),
    ],
)
def test_overlay_states_a_source_whole(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sources(overlay, SCHEMA)


@pytest.mark.parametrize("overlay", [{}, {"seed": 1}, {"model": {"dtype": "auto"}}, {"model": {"source": HUB}}])
def test_overlay_without_half_a_source_passes(overlay: dict[str, Any]) -> None:
    check_sources(overlay, SCHEMA)


def test_accepted_in_words() -> None:
    assert accepted({"type": ["string", "null"]}) == "text or null"
    assert accepted({"type": "number", "minimum": 0, "exclusiveMaximum": 1}) == "a number ≥ 0 and < 1"


def test_leaves_have_dotted_names() -> None:
    assert dict(leaves({"a": 1, "b": {"c": [2], "d": {"e": None}}})) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_few_lines_that_stand_for_very_many_values_are_refused() -> None:
    """At once: a message that showed such a value, or a comparison of its parts, would never end."""
    many: list[Any] = ["x"] * 10
    for _ in range(30):
        many = [many] * 10
    itself: dict[str, Any] = {"steps": 1}
    itself["again"] = itself
    for key, value in {"seed": many, "training": itself, "run": ["x" * 1_000_000] * 2}.items():
        with pytest.raises(UserError, match=rf"^{key}: holds more than 10000 values, an alias"):
            resolve({"run": "tiny", key: value}, SCHEMA)
