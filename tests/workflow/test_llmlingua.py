"""The script that shortens prompts with LLMLingua-2: what stays, how much it asks for, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.workflow.project import ROOT, load_script, pins

SCRIPT = load_script("llmlingua_compress")


class EverySecondWord:
    """Stands in for LLMLingua-2: keeps every second word, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def compress_prompt_llmlingua2(self, context: list[str], *, target_token: int) -> dict[str, Any]:
        [text] = context
        self.asked.append((text, target_token))
        return {"compressed_prompt": " ".join(text.split()[::2])}


@pytest.fixture
def tokenizer() -> Any:
    """Token 7 is the word w7."""
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return SCRIPT.Counting(backend)


def test_first_and_last_tokens_stay_and_what_is_between_is_shortened(tokenizer: Any) -> None:
    compressor = EverySecondWord()
    example = {"id": "e", "prompt_ids": list(range(40)), "max_new_tokens": 5}
    made = SCRIPT.shortened(example, 20, 4, 6, compressor, Spaced(tokenizer))
    # 40 less 4 and 6 are between; 20 less 4 and 6 may be.
    assert compressor.asked == [(" ".join(f"w{number}" for number in range(4, 34)), 10)]
    assert made["prompt_ids"] == [0, 1, 2, 3, *range(4, 34, 2), *range(34, 40)]
    assert {**made, "prompt_ids": None} == {**example, "prompt_ids": None}


class Spaced:
    """A tokenizer whose decoded tokens are words apart."""

    def __init__(self, tokenizer: Any) -> None:
        self.encode = tokenizer.encode
        self._decode = tokenizer.decode

    def decode(self, ids: list[int]) -> str:
        return " ".join(self._decode([token]) for token in ids)


@pytest.mark.parametrize(
    ("keep", "sinks", "last", "kept"),
    [
        (40, 4, 6, list(range(40))),  # all of it
        (10, 4, 6, [0, 1, 2, 3, *range(34, 40)]),  # what is protected is as much
        (5, 4, 6, [0, 1, 2, 3, *range(34, 40)]),  # and is kept where it is more
        (5, 4, 40, list(range(40))),  # the first and the last are the same tokens
    ],
)
def test_prompt_that_has_nothing_to_shorten_needs_no_compressor(
    tokenizer: Any, keep: int, sinks: int, last: int, kept: list[int]
) -> None:
    compressor = EverySecondWord()
    made = SCRIPT.shortened({"prompt_ids": list(range(40))}, keep, sinks, last, compressor, tokenizer)
    assert made["prompt_ids"] == kept
    assert compressor.asked == []


def test_budget_is_what_the_pruner_left_of_the_same_example(tmp_path: Path) -> None:
    rows = [{"id": "a", "kept_tokens": 12, "prompt_tokens": 40}, {"id": "b", "kept_tokens": 7, "prompt_tokens": 9}]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert SCRIPT.budgets(path) == {"a": 12, "b": 7}


def test_weights_that_the_package_cannot_tell_are_refused() -> None:
    SCRIPT.check_weights("microsoft/llmlingua-2-xlm-roberta-large-meetingbank")
    SCRIPT.check_weights("/models/llmlingua-2-bert-base-multilingual-cased-meetingbank")
    with pytest.raises(SystemExit, match="--weights gpt2: the package knows weights by their name"):
        SCRIPT.check_weights("gpt2")


def test_lock_has_the_named_release_and_leaves_torch_to_the_index() -> None:
    locked = pins("llmlingua.lock")
    assert f"llmlingua=={locked['llmlingua']}" in (ROOT / "envs" / "llmlingua.in").read_text("utf-8").splitlines()
    assert not [name for name in locked if re.match(r"torch$|triton|nvidia|cuda", name)]
    assert Version(locked["transformers"]) < Version("5")
