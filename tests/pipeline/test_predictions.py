"""Predictions under hashes: found again by content alone, kept whatever kills the process, never another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.predictions import Answer, Predictions, keys, model_digest, pruner_digest, read_examples

EXAMPLE: dict[str, Any] = {
    "id": "a",
    "task": "single",
    "prompt_ids": [1, 2, 3],
    "max_new_tokens": 4,
    "references": ["x"],
}
MADE_FROM = {"model": "m", "method": "sdtp", "keep_ratio": 0.8, "settings": {"sinks": 4, "local": 0.1}}


def answer(text: str) -> Answer:
    return Answer(prediction=text, kept_tokens=7)


def test_hash_is_of_what_decides_a_prediction() -> None:
    (key,) = keys([EXAMPLE], MADE_FROM, None)
    reordered = {"settings": {"local": 0.1, "sinks": 4}, "keep_ratio": 0.8, "method": "sdtp", "model": "m"}
    # What it is called and held against decides nothing.
    assert keys([{**EXAMPLE, "id": "b", "references": []}], reordered, None) == [key]
    others = [
        keys([{**EXAMPLE, "prompt_ids": [1, 2, 4]}], MADE_FROM, None),
        keys([{**EXAMPLE, "max_new_tokens": 5}], MADE_FROM, None),
        keys([{**EXAMPLE, "task": "samsum"}], MADE_FROM, None),
        keys([EXAMPLE], {**MADE_FROM, "keep_ratio": 0.7}, None),
        keys([EXAMPLE], {**MADE_FROM, "settings": {"sinks": 5, "local": 0.1}}, None),
        keys([EXAMPLE], MADE_FROM, 0),
        keys([EXAMPLE], MADE_FROM, 1),
    ]
    assert len({key, *(other for (other,) in others)}) == 8


def test_answers_are_there_after_the_process_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "sdtp-0.8.jsonl"
    first = Predictions(path, Answer)
    assert "k1" not in first
    first.add("k1", answer("Straße\n42"))
    first.add("k2", answer(""))
    assert first["k2"] == answer("")
    again = Predictions(path, Answer)
    assert again["k1"] == answer("Straße\n42")
    assert "k2" in again
    assert "k3" not in again


@pytest.mark.parametrize("cut", [1, 10, 40, 60])
def test_a_line_that_a_kill_cut_short_is_none(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.jsonl"
    for key in ("k1", "k2"):
        Predictions(path, Answer).add(key, answer("some text"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Predictions(path, Answer)
    assert "k1" in again
    assert "k2" not in again
    again.add("k2", answer("other text"))
    last = Predictions(path, Answer)
    assert (last["k1"], last["k2"]) == (answer("some text"), answer("other text"))
    assert len(path.read_bytes().splitlines()) == 2


def test_lines_of_something_else_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('[]\n{"hash": "k"}\n\n{"hash": "k1", "prediction": "a", "kept_tokens": 1}\n', encoding="utf-8")
    assert "k1" in Predictions(path, Answer)
    assert path.read_text(encoding="utf-8") == '{"hash": "k1", "prediction": "a", "kept_tokens": 1}\n'


def test_model_and_pruner_are_known_by_their_files(tmp_path: Path) -> None:
    model, pruner = tmp_path / "model", tmp_path / "pruner"
    for folder in (model, pruner):
        folder.mkdir()
    (model / "manifest.json").write_text(json.dumps({"weights_sha256": "a" * 64, "licence": "mit"}))
    (model / "tokenizer.json").write_text("{}")
    for name in ("pruner.json", "pruner.safetensors"):
        (pruner / name).write_text(name)
    before = (model_digest(model), pruner_digest(pruner))
    (model / "manifest.json").write_text(json.dumps({"weights_sha256": "a" * 64, "licence": "other"}))
    (pruner / ".snakemake_timestamp").touch()
    assert (model_digest(model), pruner_digest(pruner)) == before
    (model / "tokenizer.json").write_text("{ }")
    (pruner / "pruner.safetensors").write_text("others")
    assert model_digest(model) != before[0]
    assert pruner_digest(pruner) != before[1]
    (model / "tokenizer.json").write_text("{}")
    (model / "manifest.json").write_text(json.dumps({"weights_sha256": "b" * 64}))
    assert model_digest(model) != before[0]
    assert pruner_digest(None) is None


def test_examples_are_of_the_suite_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"suite": "ruler", "id": 1}\n{"suite": "longbench", "id": 2}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"examples\.jsonl, line 2: suite is 'longbench'; 'ruler' is needed"):
        list(read_examples(path, "ruler"))
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no examples; at least one is needed"):
        list(read_examples(path, "ruler"))
