"""Training: resumable to the bit, every sample once an epoch, and only the scorer changes."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil

import pytest
import torch

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import trainer
from sdtp.training.saliency import saliency
from sdtp.training.trainer import Example, Options, Weights, epoch_order, fit

SCHEDULE = PruningSchedule((1, 3), (0.7, 0.4), sinks=1, local=0.1, min_local=2)
OPTIONS = Options(
    label_epochs=0,
    label_examples=3,
    steps=15,
    batch_size=2,
    learning_rate=1e-2,
    temperature=0.5,
    weights=Weights(ce=1.0, mse=1.0, rank=1.0),
    evaluate_every=5,
    checkpoint_every=1,
    seed=1,
)


def make_examples(model, count, prefix="example"):
    generator = torch.Generator().manual_seed(len(prefix))
    examples = []
    for index in range(count):
        prompt = torch.randint(3, 128, (20 + index,), generator=generator)
        response = torch.randint(3, 128, (3,), generator=generator)
        examples.append(
            Example(f"{prefix}-{index}", prompt, response, saliency(model, prompt, response, SCHEDULE.layers))
        )
    return examples


def make_scorer():
    torch.manual_seed(3)
    return Learned(32, SCHEDULE.stages, width=8)


class Recorder(list):
    """A log that can be told to fail, as a kill would."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def __call__(self, metrics, step, split):
        self.append((step, split, metrics))
        if (step, split) == (self.stop_at, "train"):
            raise KeyboardInterrupt


def run(model, examples, folder=None, stop_at=None, options=OPTIONS, **kwargs):
    """Train a fresh scorer; returns its weights, the log, and the ids in the order the model saw them."""
    scorer, log, seen = make_scorer(), Recorder(stop_at), []

    class Watched(list):
        def __getitem__(self, index):
            seen.append(super().__getitem__(index).id)
            return super().__getitem__(index)

    with contextlib.suppress(KeyboardInterrupt):
        fit(model, scorer, SCHEDULE, Watched(examples), make_examples(model, 2, "held"), options, log, folder, **kwargs)
    return scorer.state_dict(), log, seen


def test_resumed_run_is_the_uninterrupted_one_to_the_bit(tiny_model, tmp_path):
    model = tiny_model()
    examples = make_examples(model, 10)
    weights, log, seen = run(model, examples)
    # 10 examples in batches of 2 for 15 steps: three epochs, every sample once in each, each in its own order.
    assert len(seen) == 30
    epochs = [seen[0:10], seen[10:20], seen[20:30]]
    assert all(sorted(epoch) == sorted(example.id for example in examples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3

    # Killed while step 8 was reported: in epoch 2, after 2 of its batches were checkpointed.
    _, _, first = run(model, examples, tmp_path, stop_at=8)
    resumed, again, second = run(model, examples, tmp_path)
    assert first == seen[:16]
    assert second == seen[14:]
    assert again == log  # metrics and learning rates of all 15 steps, the restored ones included
    assert [step for step, split, _ in again if split == "train"] == list(range(1, 16))
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    # Asked once more there is nothing left to do.
    finished, again, third = run(model, examples, tmp_path)
    assert third == []
    assert again == log
    assert all(torch.equal(finished[name], weights[name]) for name in weights)


@pytest.mark.parametrize("damage", ["truncated tensors", "truncated state", "no tensors", "flipped byte"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_model, tmp_path, damage):
    model = tiny_model()
    examples = make_examples(model, 4)
    options = dataclasses.replace(OPTIONS, steps=6)
    weights, log, seen = run(model, examples, options=options)
    run(model, examples, tmp_path, stop_at=5, options=options)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["step-00000003", "step-00000004"]  # the last two are kept
    newest = tmp_path / folders[-1]
    path = newest / ("state.json" if damage == "truncated state" else "state.safetensors")
    content = path.read_bytes()
    if damage == "no tensors":
        path.unlink()
    elif damage == "flipped byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[: len(content) // 2])
    resumed, again, second = run(model, examples, tmp_path, options=options)
    assert second == seen[6:]
    assert again == log
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_run_killed_while_writing_leaves_the_checkpoint_before(tiny_model, tmp_path):
    model = tiny_model()
    examples = make_examples(model, 4)
    run(model, examples, tmp_path, stop_at=5)
    partial = tmp_path / ".tmp-step-00000005"
    shutil.copytree(tmp_path / "step-00000004", partial)
    (partial / "state.json").unlink()
    _, log, seen = run(model, examples, tmp_path)
    assert len(seen) == 22
    assert log[-1][0] == 15
    assert not partial.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": "other"},
        {"options": dataclasses.replace(OPTIONS, learning_rate=2e-2)},
        {"options": dataclasses.replace(OPTIONS, weights=Weights(1.0, 1.0, 0.5))},
        {"options": dataclasses.replace(OPTIONS, seed=2)},
    ],
)
def test_checkpoints_of_other_settings_or_inputs_are_ignored(tiny_model, tmp_path, change):
    model = tiny_model()
    examples = make_examples(model, 4)
    run(model, examples, tmp_path, stop_at=3)
    _, log, seen = run(model, examples, tmp_path, stop_at=1, **change)
    assert len(seen) == 2
    assert [row[0] for row in log] == [0, 1]
    # A stale checkpoint never comes back, not even for the settings it was made with: only the new run's start is left.
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000000"]


def test_checkpoints_hold_no_pickle(tiny_model, tmp_path):
    model = tiny_model()
    run(model, make_examples(model, 4), tmp_path, stop_at=3)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"state.json", "state.safetensors"}
    state = json.loads((tmp_path / "step-00000002" / "state.json").read_text())
    assert state["step"] == 2
    assert state["rates"]["last_epoch"] == 2


def weights_hash(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def test_the_backbone_never_changes_and_gets_no_gradient(tiny_model):
    model = tiny_model()
    before = weights_hash(model)
    weights, _, _ = run(model, make_examples(model, 4), options=dataclasses.replace(OPTIONS, steps=4))
    assert weights_hash(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert not all(torch.equal(weights[name], value) for name, value in make_scorer().state_dict().items())


def test_training_learns_the_order_of_saliency(tiny_model):
    """Labels that a linear map of the states gives: a scorer that trains at all finds them."""
    model = tiny_model()
    direction = torch.randn(32)
    examples = []
    for example in make_examples(model, 6):
        states = model(example.prompt_ids[None], output_hidden_states=True).hidden_states
        labels = torch.stack([torch.nn.functional.normalize(states[layer][0], dim=-1) @ direction for layer in (1, 3)])
        examples.append(dataclasses.replace(example, saliency=labels))
    for weights in (Weights(0.0, 1.0, 0.0), Weights(0.0, 0.0, 1.0)):
        log = Recorder()
        options = dataclasses.replace(OPTIONS, steps=60, weights=weights, evaluate_every=60)
        final = fit(model, make_scorer(), SCHEDULE, examples, examples, options, log)
        assert log[0][:2] == (0, "heldout")
        assert log[0][2]["tau"] < 0.4
        assert final["tau"] > 0.7
        assert final["overlap"] > log[0][2]["overlap"]


@pytest.mark.parametrize("name", ["ce", "mse", "rank"])
def test_a_weight_of_zero_leaves_the_loss_out(tiny_model, name):
    model = tiny_model()
    options = dataclasses.replace(OPTIONS, steps=1, weights=dataclasses.replace(OPTIONS.weights, **{name: 0.0}))
    _, log, _ = run(model, make_examples(model, 2), options=options)
    (metrics,) = [metrics for _, split, metrics in log if split == "train"]
    assert {"ce", "mse", "rank"} - metrics.keys() == {name}
    assert metrics["loss"] == pytest.approx(sum(metrics[other] for other in {"ce", "mse", "rank"} - {name}), rel=1e-6)


def test_a_batch_is_the_mean_of_its_examples(tiny_model, monkeypatch):
    """Two examples accumulated make the step that their averaged gradient makes."""
    model = tiny_model()
    first, second = make_examples(model, 2)
    options = dataclasses.replace(OPTIONS, steps=1, weights=Weights(0.0, 1.0, 1.0))
    _, log, _ = run(model, [first, second], options=options)
    single = dataclasses.replace(options, batch_size=1)
    losses = []
    monkeypatch.setattr(trainer, "epoch_order", lambda seed, epoch, examples: list(range(examples)))
    for example in (first, second):
        _, alone, _ = run(model, [example], options=single)
        losses.append(alone[1][2]["loss"])
    assert log[1][2]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_learning_rate_rises_and_falls(tiny_model):
    model = tiny_model()
    _, log, _ = run(model, make_examples(model, 2), options=dataclasses.replace(OPTIONS, steps=20, batch_size=1))
    rates = [metrics["learning_rate"] for _, split, metrics in log if split == "train"]
    assert rates[0] == pytest.approx(0.5e-2)
    assert rates[1] == pytest.approx(1e-2)
    assert rates[10] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 9 / 18)) / 2)
    assert rates[19] == pytest.approx(0.0, abs=1e-9)


def test_a_non_finite_label_stops_training_and_is_named(tiny_model):
    model = tiny_model()
    examples = make_examples(model, 1)
    examples[0].saliency[1, 4] = torch.inf
    with pytest.raises(UserError, match=r"saliency of example 'example-0' at stage 1 \(layer 3\) is not finite"):
        run(model, examples)


def test_a_non_finite_score_stops_training_and_is_named(tiny_model):
    model = tiny_model()
    scorer = make_scorer()
    with torch.no_grad():
        scorer.mlps[1][2].weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"example 'example-0': scores of stage 1 \(layer 3\) are not finite"):
        fit(model, scorer, SCHEDULE, make_examples(model, 1), [], OPTIONS, Recorder())


def test_a_non_finite_loss_stops_training_and_is_named(tiny_model):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    scorer = make_scorer()
    examples = [Example("bad", torch.arange(3, 23), torch.tensor([5, 6]), torch.rand(2, 20))]
    with pytest.raises(UserError, match="loss ce of example 'bad' is nan"):
        fit(model, scorer, SCHEDULE, examples, [], OPTIONS, Recorder())
    assert all(torch.equal(value, make_scorer().state_dict()[name]) for name, value in scorer.state_dict().items())


def test_no_examples_are_named(tiny_model):
    with pytest.raises(UserError, match=r"data\.train\.examples"):
        run(tiny_model(), [])


def test_epoch_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(5)
    order = epoch_order(0, 0, 50)
    torch.manual_seed(6)
    assert epoch_order(0, 0, 50) == order
    assert sorted(order) == list(range(50))
    assert epoch_order(0, 1, 50) != order
    assert epoch_order(1, 0, 50) != order


def test_label_epochs_come_first_and_once(tiny_model, tmp_path):
    model = tiny_model()
    examples = make_examples(model, 4)
    options = dataclasses.replace(OPTIONS, steps=4, label_epochs=2, label_examples=3)
    weights, log, seen = run(model, examples, options=options)
    assert [entry[:2] for entry in log[:3]] == [(1, "labels"), (2, "labels"), (0, "heldout")]
    assert seen[:3] == ["example-0", "example-1", "example-2"]
    plain, _, _ = run(model, examples, options=dataclasses.replace(options, label_epochs=0))
    assert not torch.equal(plain["mlps.0.0.weight"], weights["mlps.0.0.weight"])

    # Killed in the first step: what the labels gave is in a checkpoint, and is not fitted again.
    run(model, examples, tmp_path, stop_at=1, options=options)
    resumed, again, second = run(model, examples, tmp_path, options=options)
    assert second == seen[3:]
    assert again == log
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
