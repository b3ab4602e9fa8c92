"""What a step read, and what it only goes on from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdtp import cli
from sdtp.pipeline.provenance import inputs


@pytest.mark.parametrize("name", ["checkpoint", "checkpoints"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_a_resumed_step_goes_on_from_is_no_input(tmp_path: Path, name: str, resumed: bool) -> None:
    data, state, output = tmp_path / "data", tmp_path / "state", tmp_path / "out"
    data.mkdir()
    if resumed:
        state.write_text("half of it")
    arguments = {"data": data, name: state, "output": output}
    assert inputs(arguments, [output]) == {"data": [data]}


def test_no_step_calls_what_it_goes_on_from_otherwise() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in cli.steps().items()}
    named = {name: set(re.findall(r'"--(\w*checkpoint\w*)"', text)) for name, text in sources.items()}
    assert {"train", "saliency", "tune", "predict", "harness"} <= {name for name, found in named.items() if found}
    for found in named.values():
        assert inputs({name: Path(__file__) for name in found}, []) == {}
