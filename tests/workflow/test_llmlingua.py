"""The scripts that shorten prompts with LLMLingua-2 and time it: what stays, how much is asked for, what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from sdtp.pipeline.files import write_jsonl
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
    """Token 7 is the word w7 with the space before it; 99 is a space, which nothing else has alone."""
    vocabulary = {f" w{number}": number for number in range(99)} | {" ": 99}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" w0"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" w\d+| "), "isolated")
    backend.decoder = decoders.Fuse()
    return SCRIPT.Counting(backend)


def example(**changes: Any) -> dict[str, Any]:
    """40 tokens, of which the context is 5 to 34; 24 of them may stay."""
    return {"id": "e", "prompt_ids": list(range(40)), "context": [5, 35], "entries": 24, "max_new_tokens": 5, **changes}


def test_a_character_of_a_text_ends_no_line(tmp_path: Path) -> None:
    rows = [example(text="\u2028 \u2029 \x85 \r\n"), example(id="f")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert SCRIPT.read(tmp_path / "rows.jsonl") == rows


def test_context_alone_is_shortened_and_what_is_around_it_stays(tokenizer: Any) -> None:
    compressor = EverySecondWord()
    made = SCRIPT.shortened(example(), compressor, tokenizer)
    # 5 + 5 are around it; 24 less these may be left of the context.
    assert compressor.asked == [("".join(f" w{number}" for number in range(5, 35)), 14)]
    assert made == {
        "id": "e",
        "prompt_ids": [*range(5), *range(5, 35, 2), *range(35, 40)],
        "context": [5, 20],
        "max_new_tokens": 5,
    }


def test_white_space_at_the_ends_of_the_context_stays(tokenizer: Any) -> None:
    made = SCRIPT.shortened(
        example(prompt_ids=[1, 2, 7, 8, 9, 10, 99, 3], context=[2, 7], entries=6), EverySecondWord(), tokenizer
    )
    # The compressor's text has none before it and none after.
    assert made["prompt_ids"] == [1, 2, 7, 9, 99, 3]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"entries": 40}, list(range(40))),  # all of it
        ({"entries": 10}, [*range(5), *range(35, 40)]),  # what is around it is as much
        ({"entries": 7}, [*range(5), *range(35, 40)]),  # and is kept where it is more
        ({"context": [5, 5]}, list(range(40))),  # there is none
    ],
)
def test_prompt_that_has_nothing_to_shorten_needs_no_compressor(
    tokenizer: Any, changes: dict[str, Any], kept: list[int]
) -> None:
    compressor = EverySecondWord()
    made = SCRIPT.shortened(example(**changes), compressor, tokenizer)
    assert made["prompt_ids"] == kept
    assert made["context"] == [5, len(kept) - 5 if changes != {"context": [5, 5]} else 5]
    assert compressor.asked == []


def test_examples_of_two_tasks_with_one_id_have_budgets_of_their_own(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = EverySecondWord()
    rows = [example(id="1", task="qasper", entries=24), example(id="1", task="lcc", entries=16)]
    path = tmp_path / "budgets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(SCRIPT, "load", lambda weights, model: (compressor, tokenizer))
    options = {"weights": "a/xlm-roberta-large", "model": "m", "examples": path, "output": tmp_path / "made.jsonl"}
    monkeypatch.setattr(
        sys, "argv", ["script", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    )
    SCRIPT.main()
    assert [asked for _, asked in compressor.asked] == [14, 6]
    made = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert [row["task"] for row in made] == ["qasper", "lcc"]


def test_prompts_without_any_context_left_are_counted(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "budgets.jsonl"
    monkeypatch.setattr(SCRIPT, "load", lambda weights, model: (EverySecondWord(), tokenizer))
    options = {"weights": "a/xlm-roberta-large", "model": "m", "examples": path, "output": tmp_path / "made.jsonl"}
    monkeypatch.setattr(
        sys, "argv", ["script", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    )
    # What is around the context is 10 tokens; the last example has no context to begin with.
    kept = [example(entries=24), example(context=[5, 5], entries=7)]
    for rows, words in (
        (kept, []),
        (
            [example(entries=10), example(entries=7), *kept],
            ["2 of 4 prompts have nothing left of their context: what is around it uses up the budget"],
        ),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        SCRIPT.main()
        assert [record.getMessage() for record in caplog.records] == words


def test_what_is_timed_is_the_whole_prompt_shortened(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    timing = load_script("llmlingua_time")
    clock = iter([0.0, 9.0, 10.0, 13.0, 20.0, 21.0, 30.0, 32.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    compressor = EverySecondWord()
    # A row of `sdtp budgets --timed`, which knows of no context.
    row = {"id": "40", "task": None, "prompt_ids": list(range(40)), "response_ids": [], "entries": 24}
    made = timing.timed(row, compressor, tokenizer, 1, 3)
    # The round of warm-up took 9 s.
    assert made == {
        "prompt_ids": list(range(40)),
        "shortened_ids": list(range(0, 40, 2)),
        "shortening_s": [3.0, 1.0, 2.0],
    }
    assert [asked for _, asked in compressor.asked] == [24] * 4


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
