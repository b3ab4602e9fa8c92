"""The check step refuses what the model has no room for, and says what it compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.steps import check

pytestmark = pytest.mark.usefixtures("no_tracking")

SETTINGS = {
    "data": {"max_tokens": 384},
    "pruning": {"start": 4, "step": 3},
    "generation": {"max_new_tokens": 32},
    "benchmark": {"prompt_tokens": [512, 1024], "new_tokens": 16},
}


def changed(block: str, **values: Any) -> Settings:
    return Settings.from_mapping(SETTINGS | {block: {**SETTINGS[block], **values}})


def test_settings_that_just_fit_are_accepted() -> None:
    assert check.check_settings(changed("pruning", start=29), 30, 1040)["layers"] == [29]
    assert check.check_settings(changed("generation", max_new_tokens=656), 30, 1040)["context_length"] == 1040
    assert check.check_settings(changed("benchmark", prompt_tokens=[10**6]), 30, None)["context_length"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (changed("pruning", start=30), r"^pruning\.start: 30 is no layer .* 30 layers"),
        (
            changed("benchmark", prompt_tokens=[1025]),
            r"^1025 \(benchmark\.prompt_tokens\) \+ 16 .* 1041 tokens.* 1040$",
        ),
        (changed("benchmark", new_tokens=17), r"^1024 .* \+ 17 \(benchmark\.new_tokens\) = 1041 tokens"),
        (changed("generation", max_new_tokens=657), r"^384 \(data\.max_tokens\) \+ 657 \(generation\.max_new_tokens\)"),
    ],
)
def test_settings_beyond_the_model_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check.check_settings(settings, 30, 1040)


def test_step_writes_what_it_compared_with(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"num_layers": 12, "context_length": 2048}))
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run" / "checked.json")]
    check.main(["--settings", json.dumps(SETTINGS), *arguments, "--metrics", str(tmp_path / "metrics.json")])
    assert json.loads((tmp_path / "run" / "checked.json").read_text()) == {
        "num_layers": 12,
        "context_length": 2048,
        "layers": [4, 7, 10],
    }
    assert json.loads((tmp_path / "metrics.json").read_text())["stages"] == 3
