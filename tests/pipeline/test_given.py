"""What is named on the command line is read, or refused in one line that names it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.errors import UserError
from sdtp.pipeline.given import load_model, load_pruner, load_tokenizer, prompt_ids, read_prompt
from tests.pipeline.conftest import TURNS


class Input:
    """Standard input that holds bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"one\ntwo\n", "one\ntwo"),
        (b"one\r\ntwo\r\n", "one\r\ntwo"),
        (b"one\n\n", "one\n"),
        (b"  one", "  one"),
        (b"\xef\xbb\xbfone\n", "one"),
        ("人民".encode(), "人民"),
    ],
)
def test_prompt_of_a_file_and_of_standard_input(
    data: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    assert read_prompt(str(tmp_path / "prompt.txt")) == text
    monkeypatch.setattr(sys, "stdin", Input(data))
    assert read_prompt("-") == text


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "there is no text in it"),
        (b" \n\n", "there is no text in it"),
        (b"ab\xff", "byte 2 is not UTF-8"),
        ("人".encode()[:2], "byte 0 is not UTF-8"),
    ],
)
def test_faults_of_a_prompt_name_it(data: bytes, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=fault) as error:
        read_prompt(str(path))
    assert str(error.value).startswith(f"{path}: ")
    monkeypatch.setattr(sys, "stdin", Input(data))
    with pytest.raises(UserError, match=f"^standard input: {fault}"):
        read_prompt("-")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError) as error:
            read_prompt(str(path))
        assert str(error.value).startswith(f"{path}: ")
        assert str(error.value).endswith("a text file is needed, or - for standard input")


def test_ids_of_a_prompt(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    def text(raw: bool, **kind: object) -> str:
        tokenizer = make_tokenizer(**kind)
        return str(tokenizer.decode(prompt_ids(tokenizer, "the people", raw=raw)))

    chat = "[turn]user\nthe people[end]\n[turn]assistant\n"
    assert text(False, template=TURNS) == chat
    assert text(True, template=TURNS) == "the people"
    assert text(False) == "the people"
    assert text(False, adds_bos=True) == text(True, adds_bos=True) == "[bos]the people"
    # The template prints the beginning-of-sequence token, and the tokenizer would add another.
    assert text(False, adds_bos=True, template="[bos]" + TURNS) == "[bos]" + chat


def test_a_template_that_wants_more_than_a_message(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = make_tokenizer(template="{{ raise_exception('a system message is needed') }}")
    with pytest.raises(UserError, match="a system message is needed; --raw leaves it out"):
        prompt_ids(tokenizer, "the people", raw=False)


def test_a_pruner_at_its_own_ratio_and_at_another(tmp_path: Path) -> None:
    schedule = PruningSchedule.geometric(4, 1, 1, 0.5, sinks=2)
    TokenPruner(schedule, scorers.HiddenNorm()).save_pretrained(tmp_path)
    assert load_pruner(tmp_path).schedule == schedule
    assert load_pruner(tmp_path, 0.9).schedule == schedule.with_ratio(0.9)
    assert load_pruner(tmp_path, 0.9).schedule.keep == pytest.approx((0.9, 0.81, 0.729))
    for ratio in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"^--ratio: ratio is"):
            load_pruner(tmp_path, ratio)
    with pytest.raises(UserError) as error:
        load_pruner(tmp_path / "none")
    assert str(error.value).startswith(f"--pruner {tmp_path / 'none'}: ")
    (tmp_path / "pruner.json").write_text("{")
    with pytest.raises(UserError) as error:
        load_pruner(tmp_path)
    assert str(error.value).startswith(f"--pruner {tmp_path}: ")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert str(error.value).startswith(f"--model {tmp_path}: no tokenizer: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/none/here", "./none", "../none", "~/none", "results/default/model", "a/b/c/"])
def test_what_can_only_be_a_folder_is_missed_as_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = f"--model {name}: there is no such folder; a folder of a model, or a hub id, is needed"
    for look in (
        lambda: load_tokenizer(name, trust_remote_code=False),
        lambda: load_model(name, torch.float32, "sdpa", trust_remote_code=False),
    ):
        with pytest.raises(UserError) as error:
            look()
        assert str(error.value) == message
