"""The check step refuses what the model or the text has no room for, and says what it compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.pipeline.benchmark_text import benchmark_prompt, write_benchmark_text
from sdtp.pipeline.config import DataSettings, Settings
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


@pytest.fixture
def model(tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> Path:
    """What the step reads of a model folder: tokenizer and manifest."""
    folder = tmp_path / "model"
    make_tokenizer(adds_bos=True).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    manifest = {"num_layers": 12, "context_length": 2048, "trust_remote_code": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run_step(model: Path, *lengths: int, **data: Any) -> dict[str, Any]:
    """What the step writes for benchmarked lengths and a text of 20 questions."""
    rows, checked = model.parent / "rows.jsonl", model.parent / "run" / "checked.json"
    texts = [{"prompt": f"question {number}", "response": "r"} for number in range(20)] + [
        {"prompt": "", "response": ""}
    ]
    rows.write_text("".join(json.dumps(text) + "\n" for text in texts))
    source = {"kind": "jsonl", "ref": str(rows), "revision": None, "sha256": None}
    settings = SETTINGS | {
        "data": {"max_tokens": 384, "malformed": "skip", "test": {"source": source}, **data},
        "benchmark": {"prompt_tokens": lengths, "new_tokens": 16},
    }
    arguments = ["--settings", json.dumps(settings), "--model", str(model), "--output", str(checked)]
    check.main([*arguments, "--metrics", str(model.parent / "metrics.json")])
    found: dict[str, Any] = json.loads(checked.read_text())
    return found


def test_step_writes_what_it_compared_with(model: Path) -> None:
    found = run_step(model, 32)
    assert found.pop("benchmark_tokens") > 32
    assert found == {"num_layers": 12, "context_length": 2048, "layers": [4, 7, 10]}
    assert json.loads((model.parent / "metrics.json").read_text())["stages"] == 3


def test_lengths_beyond_the_text_of_the_data_step_are_refused(
    model: Path, make_tokenizer: Callable[..., PreTrainedTokenizerBase], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = run_step(model, 32)["benchmark_tokens"]
    assert "left out" not in caplog.text  # that is for the data step to say
    rows = {"kind": "jsonl", "ref": str(model.parent / "rows.jsonl"), "revision": None, "sha256": None}
    data = DataSettings.from_mapping({"malformed": "skip", "test": {"source": rows}})
    text = model.parent / "text.json"
    assert write_benchmark_text(make_tokenizer(adds_bos=True), data, text) == tokens
    # All of the text is a prompt, and no more than that.
    assert run_step(model, 32, tokens)["benchmark_tokens"] == len(benchmark_prompt(text, tokens))
    (model.parent / "run" / "checked.json").unlink()
    with pytest.raises(UserError, match=rf"^benchmark\.prompt_tokens: {tokens + 1} is not in 1\.\.{tokens}, "):
        run_step(model, 32, tokens + 1)
    with pytest.raises(UserError, match=rf"benchmark\.prompt_tokens: {tokens + 1} is not in 1\.\.{tokens}, the tokens"):
        benchmark_prompt(text, tokens + 1)
    assert not (model.parent / "run" / "checked.json").exists()


def test_text_that_the_data_step_would_refuse_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 21: the prompt is empty; data\.malformed skip"):
        run_step(model, 32, malformed="fail")
