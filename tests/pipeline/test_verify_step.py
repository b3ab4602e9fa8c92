"""`sdtp verify` on folders: the table people read, the file programs read, the exit code, and faults in the input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sdtp.errors import UserError
from sdtp.pipeline.steps import verify
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.verification.families import FAMILIES, tiny_model
from sdtp.verification.verify import MODES
from tests.pruning import test_mutants

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
OFFLOADED = int(torch.accelerator.is_available())  # modes that run where there is one, for each model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tiny model, its generation settings those of a model that samples and ends at token 2."""
    model = tiny_model("llama", torch.float32)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 5])
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_model_with_a_learned_pruner(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = scorers.Learned(hidden_size=32, stages=2, width=4)
    TokenPruner(SCHEDULE, scorer).save_pretrained(tmp_path / "pruner")
    arguments = ["--model", str(saved), "--pruner", str(tmp_path / "pruner"), "--prompt-tokens", "40"]
    verify.main([*arguments, "--json", str(tmp_path / "out" / "verify.json")])
    told = lines(capsys)
    assert told[:3] == [
        str(saved),
        "  LlamaForCausalLM, 4 layers, float32, sdpa, cpu",
        "  Learned scores; of 40 prompt tokens are left 24 from layer 1, 12 from layer 3",
    ]
    head = told.index("mode                            result   max |Δ logit|, or why")
    rows = {line[:32].strip(): line[32:] for line in told[head + 1 :]}
    assert rows["static cache"].startswith("refused  cache_implementation='static' is not supported under a pruner")
    assert rows["greedy"].startswith("exact    ")
    assert 0 < float(rows["greedy"].split()[1]) < 1e-4
    assert told[-1] == f"{24 + OFFLOADED} exact, 10 refused, {1 - OFFLOADED} not run, 0 wrong"
    assert all(len(line) <= verify.WIDTH for line in told[1:])
    (found,) = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert (found["model"], found["class"], found["dtype"]) == (str(saved), "LlamaForCausalLM", "float32")
    assert (found["prompt_tokens"], found["survivors"]) == (40, [24, 12])
    assert [result["mode"] for result in found["results"]] == ["reference, nothing hidden", *MODES]
    greedy = next(result for result in found["results"] if result["mode"] == "greedy")
    assert greedy["difference"] == pytest.approx(float(rows["greedy"].split()[1]), rel=0.05)
    assert greedy["difference"] < found["tolerance"] < found["effect"]


def test_wrong_modes_are_named_and_end_with_1(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    test_mutants.compacted_positions(monkeypatch.setattr)
    arguments = ["--model", str(saved), "--prompt-tokens", "40", "--json", str(tmp_path / "verify.json")]
    with pytest.raises(SystemExit) as end:
        verify.main(arguments)
    assert end.value.code == 1
    told = lines(capsys)
    assert any(line.startswith("plain forward ") and "WRONG    |Δ logit| up to " in line for line in told)
    assert any(line.startswith("reference, nothing hidden ") and "exact " in line for line in told)
    (found,) = json.loads((tmp_path / "verify.json").read_text())
    wrong = {result["mode"] for result in found["results"] if result["verdict"] == "wrong"}
    assert {"plain forward", "greedy", "left-padded batch", "beam search", "crop after the prompt"} <= wrong
    assert told[-1].endswith(f", {len(wrong)} wrong")


def test_a_difference_that_is_no_number_is_null(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.verification.test_verify import nan_tables

    nan_tables(monkeypatch)
    with pytest.raises(SystemExit):
        verify.main(["--model", str(saved), "--prompt-tokens", "40", "--json", str(tmp_path / "verify.json")])
    text = (tmp_path / "verify.json").read_text()
    assert "NaN" not in text
    greedy = next(result for result in json.loads(text)[0]["results"] if result["mode"] == "greedy")
    assert greedy == {"mode": "greedy", "verdict": "wrong", "difference": None, "reason": "|Δ logit| up to nan"}


def test_families_are_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {family: FAMILIES[family] for family in ("llama", "bloom", "mistral_window")}
    monkeypatch.setattr(verify, "FAMILIES", some)  # all of them are tried in tests/verification/test_verify.py
    verify.main(["--families", "--prompt-tokens", "40", "--json", str(tmp_path / "verify.json")])
    told = lines(capsys)
    assert told[2].split() == ["llama", "bloom", "mistral_window"]
    rows = {line[:30].strip(): line[30:].split() for line in told[3 : 3 + 1 + len(MODES)]}
    assert list(rows) == ["reference, nothing hidden", *MODES]
    assert rows["static cache"] == ["refused"] * 3
    assert rows["cache outside the context"][1:] == ["refused", "refused"]
    assert all(0 < float(cell) < 1e-12 for cell in rows["greedy"])
    reasons = " ".join(line.strip() for line in told[3 + len(MODES) :])
    assert "not run: custom position_ids (bloom): model takes no position_ids" in reasons
    assert "refused: cache outside the context (bloom, mistral_window): this cache holds a pruned prompt" in reasons
    assert reasons.count("refused: a second pruner: a pruner is attached to this model already") == 1
    assert told[-1] == f"{68 + 3 * OFFLOADED} exact, 32 refused, {5 - 3 * OFFLOADED} not run, 0 wrong"
    found = json.loads((tmp_path / "verify.json").read_text())
    assert [one["model"] for one in found] == list(some)
    assert {one["dtype"] for one in found} == {"float64"}


def test_a_window_beyond_the_prompt_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("mistral_window", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 41}))
    verify.main(["--model", str(tmp_path), "--prompt-tokens", "40"])
    assert "  prompts lie within the sliding window of 41: give more --prompt-tokens to leave it" in lines(capsys)
    verify.main(["--model", str(tmp_path), "--prompt-tokens", "41"])
    assert not any("sliding window of" in line for line in lines(capsys))


def fault(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        verify.main(list(arguments))
    return str(error.value)


def test_faults_in_the_input(saved: Path, tmp_path: Path) -> None:
    model = ["--model", str(saved)]
    assert fault(*model, "--pruner", str(tmp_path / "none")).startswith(f"--pruner {tmp_path / 'none'}: ")
    TokenPruner(SCHEDULE, scorers.Learned(16, 2, 4)).save_pretrained(tmp_path / "other")
    other = fault(*model, "--pruner", str(tmp_path / "other"))
    assert other == f"{saved}: the scorer was trained for hidden size 16, LlamaForCausalLM has 32"
    assert "512" in fault(*model, "--prompt-tokens", "481")
    assert "removes nothing from a prompt of 12 tokens" in fault(*model, "--prompt-tokens", "12")
    assert f"{tmp_path / 'none'}: " in fault("--model", str(tmp_path / "none"))
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    refused = fault("--model", str(tmp_path / "gpt2"))
    assert f"{tmp_path / 'gpt2'}: GPT2LMHeadModel is not supported: " in refused
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((saved / "config.json").read_text())
    torch.save(tiny_model("llama").state_dict(), pickled / "pytorch_model.bin")
    assert "safetensors" in fault("--model", str(pickled))
    config = json.loads((saved / "config.json").read_text())
    one = tmp_path / "one"
    one.mkdir()
    (one / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (one / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert fault("--model", str(one)) == f"--model {one} has 1 layer: pruning needs one layer before the first stage"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "one of the arguments --model --families is required"),
        (["--families", "--pruner", "x"], "not with --families"),
        (["--model", "x", "--prompt-tokens", "0"], "--prompt-tokens 0: at least 1"),
        (["--model", "x", "--dtype", "int8"], "float32"),
    ],
)
def test_wrong_options(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        verify.main(arguments)
    assert end.value.code == 2
    assert told in capsys.readouterr().err
