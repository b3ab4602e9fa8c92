"""The train step, on files, with a tiny model."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.models import load_model
from sdtp.pipeline.shards import map_labels, write_labels
from sdtp.pipeline.steps import train
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.scorers import Learned
from sdtp.training import objective
from tests.pipeline.saliency_run import MODEL, index_of, inputs, make_run, shard

pytestmark = pytest.mark.usefixtures("no_tracking")

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
        "position": True,
        "question_rank": 8,
        "neighbours": 1,
        "recency": 0.25,
        "temperature": 0.5,
        "sampler": "gumbel_topk",
        "weights": {"ce": 1.0, "kl": 0.0, "mse": 1.0, "rank": 1.0},
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "patience": 0,
        "autocast": False,
        "gradient_checkpointing": False,
        "shard_model": False,
    },
}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """A run folder with a model and five examples, of which the last is held out."""
    make_run(tmp_path, tiny_model(), [20 + number for number in range(5)])
    return tmp_path


def fit(run: Path, index: Path, settings: dict = TRAIN, code: str = "c" * 64) -> None:
    files = ["--output", str(run / "pruner"), "--history", str(run / "history.csv")]
    files += ["--checkpoints", str(run / "checkpoints"), "--metrics", str(run / "metrics" / "train.json")]
    train.main(["--settings", json.dumps(settings), *inputs(run), "--saliency", str(index), "--code", code, *files])


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
    # One label epoch over both examples; without patience the last step is kept.
    assert (metrics["label_updates"], metrics["optimizer_steps"], metrics["kept_step"]) == (2, 4, 4)


def test_a_model_that_one_process_cannot_shard_is_told_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = index_of(run, [shard(run, 0), shard(run, 1)])
    for sharded in (False, True):
        fit(run, index, {**TRAIN, "training": {**TRAIN["training"], "shard_model": sharded}})
        assert ("training.shard_model has nothing to spread over" in caplog.text) == sharded


def test_no_room_for_what_is_tracked_ends_no_training(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def __enter__(self) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *fault: object) -> None: ...

    monkeypatch.setattr(train, "TemporaryDirectory", Full)
    fit(run, index_of(run, [shard(run, 0), shard(run, 1)]))
    assert TokenPruner.from_pretrained(run / "pruner")
    assert "the scorers of step 4 are not tracked: [Errno 28] No space left on device" in caplog.text


def test_what_made_a_scorer_is_read_off_what_was_reported() -> None:
    labels = [({"loss": 1 / epoch}, epoch, "labels") for epoch in (1, 2, 3)]
    steps = [({"loss": 1.0}, step, "train") for step in (1, 2, 3, 4)]
    evaluations = [({"kl": kl}, step, "heldout") for step, kl in ((0, 0.3), (2, 0.2), (4, 0.25))]
    reported = [*labels, evaluations[0], *steps[:2], evaluations[1], *steps[2:], evaluations[2]]
    assert train.updates(reported, 5, patience=2) == {"label_updates": 15, "optimizer_steps": 4, "kept_step": 2}
    assert train.updates(reported, 5, patience=0)["kept_step"] == 4
    # Labels alone, and the first evaluation the best: nothing of the steps was kept.
    assert train.updates([*reported, ({"kl": 0.2}, 5, "heldout")], 5, patience=2)["kept_step"] == 2
    fallen = [*labels, evaluations[0], *steps, ({"kl": 0.31}, 4, "heldout")]
    assert train.updates(fallen, 5, patience=1) == {"label_updates": 15, "optimizer_steps": 4, "kept_step": 0}
    assert train.updates(steps, 5, patience=0) == {"label_updates": 0, "optimizer_steps": 4, "kept_step": 4}


def test_train_resumes_from_checkpoints_outside_its_outputs(run: Path) -> None:
    index = index_of(run, [shard(run, 0), shard(run, 1)])
    fit(run, index)
    weights, history = load_file(run / "pruner" / "pruner.safetensors"), (run / "history.csv").read_text()
    # What Snakemake does to the outputs of a job that was killed after step 2, and a job that had got that far.
    shutil.rmtree(run / "pruner")
    (run / "history.csv").unlink()
    (last,) = (run / "checkpoints").glob("*/step-00000004")
    shutil.rmtree(last)
    fit(run, index)
    resumed = load_file(run / "pruner" / "pruner.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert (run / "history.csv").read_text() == history
    # Made by all the updates, also those before it was killed.
    metrics = json.loads((run / "metrics" / "train.json").read_text())
    assert (metrics["label_updates"], metrics["optimizer_steps"], metrics["kept_step"]) == (2, 4, 4)


@pytest.mark.parametrize(
    "change", [{"width": 9}, {"position": False}, {"question_rank": 16}, {"neighbours": 2}, {"recency": 0.5}], ids=str
)
def test_train_does_not_resume_what_a_scorer_of_other_settings_was(run: Path, change: dict) -> None:
    index = index_of(run, [shard(run, 0), shard(run, 1)])
    fit(run, index)
    settings = {**TRAIN, "training": {**TRAIN["training"], **change}}
    fit(run, index, settings)
    history, after = (run / "history.csv").read_text(), load_file(run / "pruner" / "pruner.safetensors")
    shutil.rmtree(run / "checkpoints")
    fit(run, index, settings)
    assert (run / "history.csv").read_text() == history
    anew = load_file(run / "pruner" / "pruner.safetensors")
    assert all(torch.equal(after[name], value) for name, value in anew.items())


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
            described, labels = map_labels(path)
            write_labels(path, {name: -label for name, label in labels.items()}, described)
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
