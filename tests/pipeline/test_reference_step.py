"""The reference step and the evaluation against it, on files, with a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import methods
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.models import load_model
from sdtp.pipeline.reference import Reference, write_reference
from sdtp.pipeline.steps import evaluate, reference
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline.saliency_run import MODEL, inputs, make_run
from tests.pruning.reference import Float64Throughout, masked_logits

pytestmark = pytest.mark.usefixtures("no_tracking")

# Prompt and response tokens.
TEST = {"r0": (40, 1), "c0": (33, 5), "r1": (40, 2), "c1": (40, 4)}
SETTINGS = {
    "model": MODEL,
    "pruning": {"start": 1, "step": 2, "sinks": 2, "local": 0.1, "min_local": 4},
    "evaluation": {"batch_tokens": 80, "seeds": [0, 1]},
}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """A run folder with a model and test examples."""
    folder = tmp_path / "run"
    make_run(folder, tiny_model(), [20, 21])
    write_test(folder, 1)
    return folder


def write_test(run: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "id": id_,
            "task": "retrieval" if id_[0] == "r" else "continuation",
            "prompt_ids": torch.randint(3, 128, (prompt,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 128, (response,), generator=generator).tolist(),
        }
        for id_, (prompt, response) in TEST.items()
    ]
    Dataset.from_list(rows).save_to_disk(run / "data" / "test")
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    manifest["splits"]["test"] = {"content_sha256": "e" * 64}
    (run / "data" / "manifest.json").write_text(json.dumps(manifest))


def make_reference(run: Path, **model: Any) -> Path:
    """Runs the step; the file it writes."""
    states = run / "evaluation" / "reference.safetensors"
    files = ["--output", str(states), "--metrics", str(run / "metrics" / "reference.json")]
    settings = {**SETTINGS, "model": {**MODEL, **model}}
    reference.main(["--settings", json.dumps(settings), *inputs(run), *files])
    return states


def evaluated(run: Path, method: str, ratio: float, states: Path) -> list[dict[str, Any]]:
    """Runs the evaluate step; the rows it writes."""
    rows = run / "evaluation" / f"{method}-{ratio}.jsonl"
    arguments = ["--settings", json.dumps(SETTINGS), *inputs(run), "--reference", str(states), "--method", method]
    arguments += ["--keep-ratio", str(ratio), "--output", str(rows), "--metrics", str(rows.with_suffix(".json"))]
    evaluate.main(arguments)
    return read_jsonl(rows)


def model_of(run: Path) -> Any:
    return load_model(run / "model", "float32", "sdpa", torch.device("cpu"))


def test_states_are_those_that_enter_the_head_where_the_response_is_predicted(run: Path) -> None:
    path = make_reference(run)
    states = Reference(path, run / "model", torch.float32)
    loaded = model_of(run)
    for example in load_split(run / "data", "test"):
        prompt, response = TEST[example["id"]]
        ids = torch.tensor([example["prompt_ids"] + example["response_ids"]])
        last = loaded.model(input_ids=ids).last_hidden_state[0, prompt - 1 : prompt - 1 + response]
        torch.testing.assert_close(states(example), last, rtol=0, atol=1e-5)
    metrics = json.loads((run / "metrics" / "reference.json").read_text())
    assert (metrics["examples"], metrics["positions"]) == (4, 12)


def test_unpruned_model_agrees_with_itself(run: Path) -> None:
    rows = evaluated(run, "unpruned", 1.0, make_reference(run))
    assert [row["kl"] for row in rows] == pytest.approx([0.0] * 4, abs=1e-6)
    assert [row["top1"] for row in rows] == [1.0] * 4


@pytest.mark.parametrize("ratio", [0.7, 0.4])
def test_rows_are_those_of_the_whole_models_in_float64(run: Path, ratio: float) -> None:
    rows = evaluated(run, "recent", ratio, make_reference(run))
    metrics = json.loads((run / "evaluation" / f"recent-{ratio}.json").read_text())
    schedule = PruningSchedule((1, 3), (ratio, ratio**2), sinks=2, local=0.1, min_local=4)
    model, agreed = model_of(run).double(), []
    for row, example in zip(rows, load_split(run / "data", "test"), strict=True):
        prompt, response = example["prompt_ids"], example["response_ids"]
        with TokenPruner(schedule, scorers.Recent())(model) as trace:
            model(input_ids=torch.tensor([prompt]), use_cache=True)
        ids = torch.tensor([prompt + response[:-1]])
        with Float64Throughout(), torch.no_grad():
            # Both see every token at once: removed ones are hidden, and nothing is cached.
            whole = model(input_ids=ids, use_cache=False).logits
            hidden = masked_logits(model, ids, torch.ones_like(ids), schedule.layers, trace.kept, len(prompt))
        log_q, log_p = (one[0, len(prompt) - 1 :].log_softmax(-1) for one in (whole, hidden))
        kl = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
        top1 = float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean())
        assert row["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert row["top1"] == top1
        assert kl > 1e-3
        agreed.append(row)
    for task in ("retrieval", "continuation"):
        own = [row for row in agreed if row["task"] == task]
        for name in ("kl", "top1"):
            assert metrics[f"{task}/{name}"] == pytest.approx(sum(row[name] for row in own) / len(own))
    assert 0.0 < sum(row["top1"] for row in agreed) < 4.0


def test_equal_states_are_equal_bytes(run: Path) -> None:
    first = make_reference(run).read_bytes()
    assert make_reference(run).read_bytes() == first


def test_states_have_the_models_dtype(run: Path) -> None:
    path = make_reference(run, dtype="bfloat16")
    example = load_split(run / "data", "test")[1]
    assert Reference(path, run / "model", torch.bfloat16)(example).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"reference\.safetensors holds bfloat16 states and the model runs in float32"):
        evaluated(run, "unpruned", 1.0, path)


def test_missing_reference_is_named(run: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors: .*the file of states that the reference step makes"):
        evaluated(run, "unpruned", 1.0, run / "nowhere.safetensors")
    assert not (run / "evaluation" / "unpruned-1.0.jsonl").exists()


def test_damaged_reference_is_named(run: Path) -> None:
    path = make_reference(run)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"reference\.safetensors: .* is needed"):
        Reference(path, run / "model", torch.float32)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"reference\.safetensors does not match its checksum"):
        Reference(path, run / "model", torch.float32)
    save_file({"r0": torch.zeros(1, 32)}, path)
    with pytest.raises(UserError, match=r"reference\.safetensors: KeyError 'description'"):
        Reference(path, run / "model", torch.float32)


def test_states_without_an_example_of_their_description_are_refused(run: Path) -> None:
    path = make_reference(run)
    with safe_open(path, framework="pt") as file:
        about, states = file.metadata(), {name: file.get_tensor(name) for name in file.keys() if name != "c0"}  # noqa: SIM118
    save_file(states, path, about)
    with pytest.raises(UserError, match="does not match its checksum"):
        Reference(path, run / "model", torch.float32)


def test_reference_of_another_model_is_refused(run: Path) -> None:
    path = make_reference(run)
    manifest = run / "model" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("mmm", "nnn"))
    with pytest.raises(UserError, match=r"reference\.safetensors is of another model than .*run/model: run the"):
        evaluated(run, "unpruned", 1.0, path)


def test_reference_of_other_data_is_refused_by_the_example(run: Path) -> None:
    path = make_reference(run)
    write_test(run, 2)
    with pytest.raises(UserError, match=r"reference\.safetensors has other tokens for example 'r0'"):
        evaluated(run, "unpruned", 1.0, path)
    examples = [{"id": "x", "prompt_ids": [3], "response_ids": [4]}]
    write_reference(path, {"x": torch.zeros(1, 32)}, examples, run / "model")
    with pytest.raises(UserError, match=r"reference\.safetensors has no example 'r0'"):
        evaluated(run, "unpruned", 1.0, path)


def test_an_overflow_of_the_unpruned_model_names_the_example(run: Path) -> None:
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"largest logit of the unpruned model on example '[rc]\d' is nan: the model's"):
        make_reference(run)
    assert not (run / "evaluation" / "reference.safetensors").exists()


def test_an_overflow_under_pruning_names_the_example(run: Path) -> None:
    states, model = Reference(make_reference(run), run / "model", torch.float32), model_of(run)
    last = model.model.layers[-1]
    last.register_forward_hook(lambda module, args, out: out * math.inf if 5 < args[0].shape[1] < 33 else out)
    schedule = PruningSchedule((1, 3), (0.7, 0.5), sinks=2, min_local=4)
    pruner = methods.Fixed(TokenPruner(schedule, scorers.Recent()))
    with pytest.raises(UserError, match=r"loss of example '[rc]\d' is nan: the model's logits are not finite there"):
        evaluate.evaluate(model, load_split(run / "data", "test").to_list(), pruner, 80, states)
