"""`sdtp show`: the text whole, every token with its stage, the counts of the legend, and faults in the input."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sdtp import TokenPruner, scorers
from sdtp.errors import UserError
from sdtp.pipeline.steps import show
from sdtp.pipeline.terminal import KEPT, RAMP
from tests.pipeline.conftest import TURNS
from tests.pipeline.saved import SCHEDULE, save

PROMPT = "The people of the United States met.\nQuestion: what is 人民 in the city of the country?"
CODE = re.compile("\x1b\\[48;5;(\\d+);38;5;\\d+m(.*?)\x1b\\[0m")


class Terminal(io.TextIOWrapper):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True

    def told(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.fixture
def arguments(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> list[str]:
    """A prompt, a model and a pruner in files."""
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
    return [str(tmp_path / "prompt.txt"), *save(tmp_path, tiny_model, make_tokenizer(template=TURNS))]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    show.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_json_has_every_token_with_its_stage_and_scores(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(arguments, capsys)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[token["id"] for token in found["tokens"]]])
    assert "".join(token["text"] for token in found["tokens"]) == f"[turn]user\n{PROMPT}[end]\n[turn]assistant\n"
    assert tokenizer.decode(ids[0]) == f"[turn]user\n{PROMPT}[end]\n[turn]assistant\n"
    pruner = TokenPruner(SCHEDULE, scorers.HiddenNorm())
    with pruner(model) as trace, torch.inference_mode():
        model(input_ids=ids, logits_to_keep=1)
    first, last = (set(stage[0].tolist()) for stage in trace.kept)
    stages = [0 if i not in first else 1 if i not in last else None for i in range(ids.shape[1])]
    assert [token["removed_at_stage"] for token in found["tokens"]] == stages
    assert [token["removed_before_layer"] for token in found["tokens"]] == [
        None if stage is None else (1, 3)[stage] for stage in stages
    ]
    with torch.inference_mode():
        norms = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0].norm(dim=-1)
    assert [token["scores"][0] for token in found["tokens"]] == pytest.approx(norms.tolist(), rel=1e-4)
    assert [token["scores"][1] is None for token in found["tokens"]] == [stage == 0 for stage in stages]
    n = found["prompt_tokens"]
    assert n == ids.shape[1]
    assert found["stages"] == [
        {"stage": 0, "layer": 1, "removed": n - round(0.6 * n), "left": round(0.6 * n)},
        {"stage": 1, "layer": 3, "removed": round(0.6 * n) - round(0.3 * n), "left": round(0.3 * n)},
    ]


def test_ratio_is_that_of_the_pruners_call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = shown([*arguments, "--ratio", "0.8"], capsys)
    n = found["prompt_tokens"]
    assert [stage["left"] for stage in found["stages"]] == [round(0.8 * n), round(0.64 * n)]
    assert found["ratio"] == 0.8


def test_marks_where_no_terminal_is(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = shown([*arguments, "--raw"], capsys)
    show.main([*arguments, "--raw"])
    told = capsys.readouterr().out
    assert "\x1b" not in told
    text, legend = told.split("\n\n")
    assert re.sub(r"⟨[13]\||⟩|↵", "", text) == PROMPT  # 人民, which are six tokens, among it
    removed = [sum(token["removed_at_stage"] == stage for token in found["tokens"]) for stage in (0, 1)]
    n = found["prompt_tokens"]
    assert legend.splitlines()[0] == f"{n} tokens, {n - sum(removed)} of them in every layer"
    rows = [line.split() for line in legend.splitlines()[2:]]
    assert rows == [
        ["⟨1|…⟩", "before", "layer", "1", str(removed[0]), str(n - removed[0]), f"{100 * (n - removed[0]) / n:.0f}%"],
        ["⟨3|…⟩", "before", "layer", "3", str(removed[1]), str(n - sum(removed)),
         f"{100 * (n - sum(removed)) / n:.0f}%"],
    ]  # fmt: skip


def test_colours_on_a_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*options: str, no_color: str = "") -> str:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
        show.main([*arguments, "--raw", *options])
        return sys.stdout.told()  # type: ignore[attr-defined]

    coloured = told()
    text, legend = coloured.split("\n\n")
    assert CODE.sub(r"\2", text).replace("↵", "") == PROMPT
    assert {int(colour) for colour, _ in CODE.findall(text)} == {RAMP[0], RAMP[-1], KEPT}
    assert [int(colour) for colour, _ in CODE.findall(legend)] == [KEPT, RAMP[0], RAMP[-1]]
    # Columns stand under each other whatever the codes between them.
    rows = [CODE.sub(r"\2", line) for line in legend.splitlines()[1:]]
    assert len({row.index("left") + 4 if "left" in row else len(row) - 6 for row in rows}) == 1
    assert "\x1b" not in told("--no-color")
    assert "\x1b" not in told(no_color="1")
    assert told("--no-color").startswith("⟨") or "⟨1|" in told("--no-color")


def test_standard_input(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(arguments, capsys)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert shown(["-", *arguments[1:]], capsys) == found


def test_a_prompt_that_is_left_alone(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("xyz")
    show.main([*arguments, "--raw"])
    assert capsys.readouterr().out.splitlines() == [
        "xyz", "", "3 tokens, 3 of them in every layer",
        "nothing was removed: the prompt is no longer than what the pruner's schedule protects",
    ]  # fmt: skip
    found = shown([*arguments, "--raw"], capsys)
    assert [token["scores"] for token in found["tokens"]] == [[None, None]] * 3


def test_faults_are_one_line(
    arguments: list[str],
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    def fault(*arguments: str) -> str:
        with pytest.raises(UserError) as error:
            show.main(list(arguments))
        assert "\n" not in str(error.value)
        return str(error.value)

    prompt, *named = arguments
    assert fault(str(tmp_path / "none"), *named).startswith(f"{tmp_path / 'none'}: ")
    assert fault(*arguments, "--ratio", "2").startswith("--ratio: ")
    assert fault(prompt, "--model", str(tmp_path), *named[2:]).startswith(f"--model {tmp_path}: ")
    other = save(tmp_path / "other", tiny_model, make_tokenizer(), scorers.Learned(16, 2, 4))
    told = fault(prompt, *other)
    assert told.startswith(f"--pruner {tmp_path / 'other' / 'pruner'}: the scorer was trained for hidden size 16")
    (tmp_path / "long.txt").write_text("the people " * 300)
    told = fault(str(tmp_path / "long.txt"), *named)
    assert re.search(r"\(the prompt\) .* tokens: the model's context has 512", told)
