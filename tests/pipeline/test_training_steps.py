"""The saliency, saliency-index and train steps, on files, with a tiny model."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.models import load_model
from sdtp.pipeline.shards import Labels
from sdtp.pipeline.steps import saliency, saliency_index, train
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.scorers import Learned
from sdtp.training import objective
from sdtp.training.saliency import saliency as compute

MODEL = {"dtype": "float32", "attention": "sdpa"}
SALIENCY = {
    "seed": 0,
    "model": MODEL,
    "pruning": {"start": 1, "step": 2},
    "saliency": {"reduction": "signed", "target": "loss", "gradient_checkpointing": False},
}
TRAIN = {
    "seed": 0,
    "model": MODEL,
    "pruning": {"start": 1, "step": 2, "sinks": 1, "local": 0.1, "min_local": 2},
    "training": {
        "keep_ratio": 0.7,
        "label_epochs": 1,
        "label_examples": 2,
        "steps": 4,
        "batch_size": 1,
        "learning_rate": 1e-2,
        "width": 8,
        "temperature": 0.5,
        "weights": {"ce": 1.0, "mse": 1.0, "rank": 1.0},
        "evaluate_every": 2,
        "checkpoint_every": 2,
    },
}


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """A run folder with a model and five examples, of which the last is held out."""
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"sha256": "m" * 64, "trust_remote_code": False}))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "id": f"e{index}",
            "prompt_ids": torch.randint(3, 128, (20 + index,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 128, (3,), generator=generator).tolist(),
        }
        for index in range(5)
    ]
    Dataset.from_list(rows[:4]).save_to_disk(tmp_path / "data" / "train")
    Dataset.from_list(rows[4:]).save_to_disk(tmp_path / "data" / "heldout")
    splits = {split: {"content_sha256": "e" * 64} for split in ("train", "heldout")}
    manifest = {"content_sha256": "d" * 64, "splits": splits}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def inputs(run: Path) -> list[str]:
    return ["--model", str(run / "model"), "--data", str(run / "data")]


def shard(run: Path, index: int, count: int = 2, settings: dict = SALIENCY) -> Path:
    output = run / "saliency" / f"shard-{index}.safetensors"
    arguments = ["--settings", json.dumps(settings), *inputs(run), "--shard", str(index), "--shards", str(count)]
    saliency.main([*arguments, "--output", str(output), "--metrics", str(run / "metrics" / f"s{index}.json")])
    return output


def index_of(run: Path, shards: list[Path]) -> Path:
    output = run / "saliency" / "index.json"
    arguments = ["--settings", "{}", "--data", str(run / "data"), "--shards", *map(str, shards)]
    saliency_index.main([*arguments, "--output", str(output), "--metrics", str(run / "metrics" / "index.json")])
    return output


def fit(run: Path, index: Path, settings: dict = TRAIN, code: str = "c" * 64) -> None:
    files = ["--output", str(run / "pruner"), "--history", str(run / "history.csv")]
    files += ["--checkpoints", str(run / "checkpoints"), "--metrics", str(run / "metrics" / "train.json")]
    train.main(["--settings", json.dumps(settings), *inputs(run), "--saliency", str(index), "--code", code, *files])


def test_shards_hold_each_example_once_with_what_made_them(
    run: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    first, second = load_file(shard(run, 0)), load_file(shard(run, 1))
    assert sorted(first) == ["e0", "e2", "e4"]
    assert sorted(second) == ["e1", "e3"]
    (row,) = Dataset.load_from_disk(str(run / "data" / "heldout")).to_list()
    prompt, response = torch.tensor(row["prompt_ids"]), torch.tensor(row["response_ids"])
    assert torch.equal(first["e4"], compute(tiny_model(), prompt, response, (1, 3), "signed"))
    with safe_open(run / "saliency" / "shard-0.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "reduction": "signed",
            "target": "loss",
            "layers": "[1, 3]",
            "model_sha256": "m" * 64,
            "data_sha256": "d" * 64,
        }
    assert json.loads((run / "metrics" / "s1.json").read_text())["examples"] == 2


def test_index_lists_examples_in_the_order_of_the_data_and_reads_them_back(run: Path) -> None:
    shards = [shard(run, 0), shard(run, 1)]
    index = index_of(run, shards)
    content = json.loads(index.read_text())
    assert content["examples"] == [
        {"id": f"e{number}", "shard": f"shard-{number % 2}.safetensors", "tokens": 20 + number} for number in range(5)
    ]
    assert content["layers"] == [1, 3]
    labels = Labels(index)
    assert torch.equal(labels["e3"], load_file(shards[1])["e3"])
    with pytest.raises(UserError, match="no example 'e9'"):
        labels["e9"]
    shards[1].write_bytes(shards[1].read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"shard-1\.safetensors is not the shard"):
        Labels(index)


def test_index_refuses_shards_that_do_not_cover_the_data_once(run: Path) -> None:
    first, second = shard(run, 0), shard(run, 1)
    with pytest.raises(UserError, match="2 examples have no saliency, 'e1' for one"):
        index_of(run, [first])
    again = run / "saliency" / "again.safetensors"
    shutil.copyfile(first, again)
    with pytest.raises(UserError, match=r"example 'e0' is in shard-0\.safetensors as well"):
        index_of(run, [first, second, again])
    other = shard(run, 1, settings={**SALIENCY, "saliency": {**SALIENCY["saliency"], "reduction": "abs"}})
    with pytest.raises(UserError, match=r"shard-1\.safetensors: reduction is abs, but signed in .*shard-0"):
        index_of(run, [first, other])
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shard-0\.safetensors is not a whole saliency shard"):
        index_of(run, [first])


def test_index_refuses_labels_of_other_data(run: Path) -> None:
    shards = [shard(run, 0, 1)]
    rows = Dataset.load_from_disk(str(run / "data" / "heldout")).to_list()
    shutil.rmtree(run / "data" / "heldout")
    rows[0]["prompt_ids"].append(5)
    Dataset.from_list(rows).save_to_disk(run / "data" / "heldout")
    with pytest.raises(UserError, match=r"'e4' has shape \(2, 24\), but \(2, 25\)"):
        index_of(run, shards)
    (run / "data" / "manifest.json").write_text(json.dumps({"content_sha256": "x" * 64}))
    with pytest.raises(UserError, match=r"data_sha256 of the shards is d+, but the data's is x+"):
        index_of(run, shards)


@pytest.mark.parametrize("index", [-1, 2])
def test_saliency_refuses_a_shard_there_is_none_of(run: Path, index: int) -> None:
    with pytest.raises(UserError, match=f"--shard is {index}: a number from 0 to 1"):
        shard(run, index)


def test_train_writes_a_pruner_its_curves_and_metrics(run: Path) -> None:
    fit(run, index_of(run, [shard(run, 0), shard(run, 1)]))
    pruner = TokenPruner.from_pretrained(run / "pruner")
    assert pruner.schedule.layers == (1, 3)
    assert pruner.schedule.keep == (0.7, 0.7**2)
    assert isinstance(pruner.scorer, Learned)
    assert pruner.trained_for == fingerprint(load_model(run / "model", "float32", "sdpa", torch.device("cpu")))
    with (run / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "split", "metric", "value"]
    assert [int(row["step"]) for row in rows if row["metric"] == "tau"] == [0, 2, 4]
    assert [int(row["step"]) for row in rows if (row["split"], row["metric"]) == ("train", "rank")] == [1, 2, 3, 4]
    metrics = json.loads((run / "metrics" / "train.json").read_text())
    assert metrics["heldout_tau"] == float([row["value"] for row in rows if row["metric"] == "tau"][-1])


def test_train_resumes_from_checkpoints_outside_its_outputs(run: Path) -> None:
    index = index_of(run, [shard(run, 0), shard(run, 1)])
    fit(run, index)
    weights, history = load_file(run / "pruner" / "pruner.safetensors"), (run / "history.csv").read_text()
    # What Snakemake does to the outputs of a job that was killed after step 2, and a job that had got that far.
    shutil.rmtree(run / "pruner")
    (run / "history.csv").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    fit(run, index)
    resumed = load_file(run / "pruner" / "pruner.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert (run / "history.csv").read_text() == history


@pytest.mark.parametrize("changed", ["labels", "code"])
def test_train_does_not_resume_what_other_labels_or_other_code_made(
    run: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A finished run leaves checkpoints; a rerun is there because something changed."""
    index = index_of(run, [shard(run, 0), shard(run, 1)])
    fit(run, index)
    before = load_file(run / "pruner" / "pruner.safetensors")
    code = "c" * 64
    if changed == "labels":  # other numbers, of the same model, data and settings
        for path in sorted((run / "saliency").glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                described = file.metadata()
            save_file({name: -labels for name, labels in load_file(path).items()}, path, described)
        index = index_of(run, sorted((run / "saliency").glob("*.safetensors")))
    else:
        code = "e" * 64
        true_loss = objective.standardised_mse
        monkeypatch.setattr(objective, "standardised_mse", lambda *args: 2 * true_loss(*args))
    fit(run, index, code=code)
    after = load_file(run / "pruner" / "pruner.safetensors")
    shutil.rmtree(run / "checkpoints")
    fit(run, index, code=code)
    anew = load_file(run / "pruner" / "pruner.safetensors")
    assert all(torch.equal(after[name], value) for name, value in anew.items())
    assert not any(torch.equal(after[name], before[name]) for name in before if name.endswith("weight"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"start": 2}, r"layers is \[1, 3\], but \[2\] is needed"),
        ({"model_sha256": "y"}, "model_sha256 is m+, but y is needed"),
        ({"data_sha256": "z"}, "data_sha256 is d+, but z is needed"),
    ],
)
def test_train_refuses_labels_of_other_stages_model_or_data(run: Path, change: dict, named: str) -> None:
    index = index_of(run, [shard(run, 0, 1)])
    if "model_sha256" in change:
        (run / "model" / "manifest.json").write_text(json.dumps({"sha256": "y", "trust_remote_code": False}))
    if "data_sha256" in change:
        (run / "data" / "manifest.json").write_text(json.dumps({"content_sha256": "z"}))
    pruning = {**TRAIN["pruning"], "start": change.get("start", 1)}
    with pytest.raises(UserError, match=named):
        fit(run, index, {**TRAIN, "pruning": pruning})
