"""Settings give a step exactly what its rule passed, typed."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from sdtp.pipeline.block import Block, Source
from sdtp.pipeline.config import Settings
from tests.workflow.golden import SCHEMA, resolved

# What no step is ever given: where it is tracked, and other variants than its own.
NO_SETTINGS = ("variants", "tracking")
PASSED = '{"pruning":{"local":0.2,"min_local":8,"sinks":2,"start":4,"step":3},"evaluation":{"seeds":[3,1]},"seed":7}'


def test_passed_settings_are_attributes() -> None:
    settings = Settings.from_json(PASSED)
    assert settings.seed == 7
    assert settings.pruning.local == 0.2
    assert settings.evaluation.seeds == (3, 1)


def test_nested_source() -> None:
    settings = Settings.from_json('{"model":{"source":{"kind":"hub","ref":"a/b","revision":null,"sha256":null}}}')
    assert (settings.model.source.kind, settings.model.source.revision) == ("hub", None)


def test_source_that_may_be_null_is_a_source_or_none() -> None:
    source = '{"kind":"hub","ref":"a/b","revision":null,"sha256":null}'
    found = [Settings.from_json(f'{{"suites":{{"longbench":{{"source":{text}}}}}}}') for text in (source, "null")]
    assert found[0].suites.longbench.source == Source("hub", "a/b", None, None)
    assert found[1].suites.longbench.source is None
    with pytest.raises(ValueError, match=r"setting suites\.longbench\.source\.kinds is not known"):
        Settings.from_json('{"suites":{"longbench":{"source":{"kinds":"hub"}}}}')


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda settings: settings.training, "setting training was not passed"),
        (lambda settings: settings.pruning.keep_ratios, r"setting pruning\.keep_ratios was not passed"),
    ],
)
def test_setting_that_was_not_passed_is_named(read: typing.Callable[[Settings], object], name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        read(Settings.from_json(PASSED))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sed":1}', "setting sed is not known; settings has run, seed, model"),
        ('{"training":{"stepz":1}}', r"setting training\.stepz is not known; training has gpus, keep_ratio"),
        ('{"training":{"weights":{"l1":1}}}', r"setting training\.weights\.l1 is not known; training\.weights has ce,"),
    ],
)
def test_unknown_setting_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_json(text)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.from_json(PASSED).seed = 1  # type: ignore[misc]


def test_printed_settings_are_those_passed() -> None:
    assert repr(Settings.from_json('{"seed":7,"evaluation":{"seeds":[3]}}')) == (
        "Settings(seed=7, evaluation=EvaluationSettings(seeds=(3,)))"
    )


def test_blocks_have_the_keys_of_the_schema() -> None:
    def fields(block: type[Block]) -> dict[str, object]:
        hints = {name: hint for name, hint in typing.get_type_hints(block).items() if not name.startswith("_")}
        nested = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Block)}
        return {name: fields(nested[name]) if name in nested else None for name in hints}

    def keys(node: dict[str, typing.Any]) -> dict[str, object]:
        return {name: keys(child) if child["type"] == "object" else None for name, child in node["properties"].items()}

    assert fields(Settings) == {name: child for name, child in keys(SCHEMA).items() if name not in NO_SETTINGS}


def test_whole_configuration_is_accepted() -> None:
    config = {key: value for key, value in resolved("config.yaml").items() if key not in NO_SETTINGS}
    assert Settings.from_mapping(config).benchmark.prompt_tokens == (512, 1024, 2048)
