"""`sdtp compare`: both texts are the model's own, what differs is marked, and numbers are told of the right arm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sdtp import TokenPruner, scorers
from sdtp.errors import UserError
from sdtp.pipeline.comparison import Times
from sdtp.pipeline.steps import compare
from tests.pipeline.conftest import TURNS
from tests.pipeline.saved import SCHEDULE, save

PROMPT = "The people of the United States met in the city. Question: what is the value of the answer?"


@pytest.fixture
def arguments(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> list[str]:
    """A prompt, a model and a pruner in files, and a small measurement."""
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    named = save(tmp_path, tiny_model, make_tokenizer(template=TURNS))
    return [str(tmp_path / "prompt.txt"), *named, "--max-new-tokens", "6", "--repeats", "2"]


def continuations(folder: Path, text: str, ratio: float | None = None) -> tuple[list[int], list[int]]:
    """New tokens of plain generation, without and with the pruner."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    settings = {"max_new_tokens": 6, "do_sample": False}
    length = inputs.input_ids.shape[1]
    plain = model.generate(**inputs, **settings)[0, length:].tolist()
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model, ratio=ratio):
        pruned = model.generate(**inputs, **settings)[0, length:].tolist()
    return plain, pruned


@pytest.mark.parametrize(
    ("options", "text", "ratio"),
    [
        ([], f"[turn]user\n{PROMPT}[end]\n[turn]assistant\n", None),
        (["--raw"], PROMPT, None),
        (["--raw", "--ratio", "0.9"], PROMPT, 0.9),
    ],
)
def test_json(
    options: list[str],
    text: str,
    ratio: float | None,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare.main([*arguments, *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    plain, pruned = continuations(tmp_path, text, ratio)
    assert plain != pruned
    assert (found["unpruned"]["tokens"], found["pruned"]["tokens"]) == (plain, pruned)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert found["pruned"]["text"] == tokenizer.decode(pruned)
    at = found["first_difference"]
    assert plain[:at] == pruned[:at]
    assert plain[at] != pruned[at]
    n = len(tokenizer(text, add_special_tokens=False).input_ids)
    schedule = SCHEDULE if ratio is None else SCHEDULE.with_ratio(ratio)
    assert (found["prompt_tokens"], found["tokens_left"]) == (n, schedule.surviving(n))
    assert (found["layers"], found["new_tokens_timed"], found["repeats"], found["warmup"]) == ([1, 3], 6, 2, 1)
    assert set(found["times"]) == {"prefill_s", "decode_s", "seconds_per_output_token", "end_to_end_s"}
    for arm in ("unpruned", "pruned"):
        prefill, decode, whole = (found["times"][part][arm] for part in ("prefill_s", "decode_s", "end_to_end_s"))
        assert all(0 < value < 60 for value in (*prefill, *decode, *whole))
        assert whole[1] > decode[1]
    assert found["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")


def test_side_by_side(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is wrapped
    compare.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    compare.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [part.strip() for part in lines[0].split("│")] == ["unpruned", "pruned"]
    n, at = found["prompt_tokens"], found["first_difference"]
    assert f"▶ the first difference: new token {at + 1}" in lines
    assert f"of {n} prompt tokens are left {round(0.6 * n)} from layer 1, {round(0.3 * n)} from layer 3" in lines
    beside = "\n".join(lines[2 : lines.index("")])
    assert beside.count("▶") == 2
    table = lines[lines.index("") + 4 :]
    assert table[0].split() == ["unpruned", "pruned", "unpruned", "/", "pruned", "(quartiles)"]
    assert [re.split(r"  +", row)[0] for row in table[1:5]] == ["prefill", "decode", "one token", "end to end"]
    for row in table[1:5]:
        assert re.fullmatch(r"[a-z ]+ +[\d.e−]+ m?s +[\d.e−]+ m?s  [\d.]+× \([\d.]+–[\d.]+\)", row)
    assert lines[-2].startswith("Medians of 2 rounds after 1 of warm-up, 6 new tokens each, ")
    assert "One prompt's times are a sample" in lines[-1]


def test_the_table_by_hand() -> None:
    prefill = Times(unpruned=(1.8, 2.0, 2.2), pruned=(0.9, 1.0, 1.1), ratio=(1.7, 1.9, 2.1))
    token = Times(unpruned=(0.02, 0.021, 0.022), pruned=(0.012, 0.013, 0.014), ratio=(1.5, 1.6, 1.7))
    times = {"prefill_s": prefill, "decode_s": None, "seconds_per_output_token": token, "end_to_end_s": prefill}
    assert compare._table(times) == [
        "              unpruned      pruned  unpruned / pruned (quartiles)",
        "prefill         2.00 s      1.00 s  1.90× (1.70–2.10)",
        "one token      21.0 ms     13.0 ms  1.60× (1.50–1.70)",
        "end to end      2.00 s      1.00 s  1.90× (1.70–2.10)",
    ]


def test_the_mark_stands_before_the_first_token_that_differs(tmp_path: Path, arguments: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("the people", add_special_tokens=False).input_ids
    assert len(ids) > 1
    first = tokenizer.decode(ids[:1])
    assert compare._marked(tokenizer, ids, 1) == f"{first}▶{'the people'.removeprefix(first)}"
    assert compare._marked(tokenizer, ids, len(ids)) == "the people▶"  # this one ended, the other goes on
    assert compare._marked(tokenizer, ids, None) == "the people"


def test_equal_texts_are_said_to_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([*arguments, "--ratio", "1"])
    told = capsys.readouterr().out
    assert "▶" not in told
    assert "\nno difference in 6 new tokens\n" in told


def test_one_new_token_has_no_decoding(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([*arguments, "--max-new-tokens", "1", "--repeats", "1"])
    told = capsys.readouterr().out
    assert re.findall(r"^(prefill|decode|one token|end to end)", told, re.MULTILINE) == ["prefill", "end to end"]
    assert "Medians of 1 round after" in told


def test_faults_in_the_input(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"\(new tokens\) .* the model's context has 512"):
        compare.main([*arguments, "--max-new-tokens", "500"])
    for option in ("--max-new-tokens", "--repeats"):
        with pytest.raises(SystemExit) as end:
            compare.main([*arguments, option, "0"])
        assert end.value.code == 2
        assert f"{option} 0: at least 1 is needed" in capsys.readouterr().err
    TokenPruner(SCHEDULE, scorers.Learned(16, 2, 4)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError) as error:
        compare.main([*arguments, "--pruner", str(tmp_path / "other")])
    assert str(error.value).startswith(f"--pruner {tmp_path / 'other'}: the scorer was trained for hidden size 16")
