"""Training: resumable to the bit, every sample once an epoch, and only the scorer changes."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import label_fit, objective, trainer
from sdtp.training.checkpoints import Checkpoints
from sdtp.training.examples import Example
from sdtp.training.gradients import epoch_order
from sdtp.training.heldout import HeldOut
from sdtp.training.objective import Weights, example_losses
from sdtp.training.options import Options
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from sdtp.training.saliency import saliency
from sdtp.training.samplers import SAMPLERS
from sdtp.training.trainer import fit

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
    patience=0,
    autocast=False,
    gradient_checkpointing=False,
    seed=1,
    sampler="gumbel_topk",
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

    def __init__(self, stop_at=None, split="train"):
        self.stop_at = stop_at, split

    def __call__(self, metrics, step, split):
        self.append((step, split, metrics))
        if (step, split) == self.stop_at:
            raise KeyboardInterrupt


def run(model, examples, folder=None, stop_at=None, options=OPTIONS, scorer=None, stop_in="train", **kwargs):
    """Train a fresh scorer; returns its weights, the log, and the ids in the order the model saw them."""
    scorer, log, seen = scorer or make_scorer(), Recorder(stop_at, stop_in), []

    class Watched(list):
        def __getitem__(self, index):
            seen.append(super().__getitem__(index).id)
            return super().__getitem__(index)

    with contextlib.suppress(KeyboardInterrupt):
        fit(model, scorer, SCHEDULE, Watched(examples), make_examples(model, 2, "held"), options, log, folder, **kwargs)
    return scorer.state_dict(), log, seen


def only_state(folder):
    """The checkpoints' folder of the one training there was."""
    (found,) = folder.iterdir()
    return found


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


@pytest.mark.parametrize(
    "damage", ["truncated tensors", "truncated state", "no tensors", "flipped byte", "edited learning rate"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_model, tmp_path, damage):
    model = tiny_model()
    examples = make_examples(model, 4)
    options = dataclasses.replace(OPTIONS, steps=6)
    weights, log, seen = run(model, examples, options=options)
    run(model, examples, tmp_path, stop_at=5, options=options)
    folders = sorted(only_state(tmp_path).iterdir())
    assert [path.name for path in folders] == ["step-00000003", "step-00000004"]  # the last two are kept
    newest = folders[-1]
    path = newest / ("state.json" if damage in ("truncated state", "edited learning rate") else "state.safetensors")
    content = path.read_bytes()
    if damage == "no tensors":
        path.unlink()
    elif damage == "flipped byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "edited learning rate":
        state = json.loads(content)
        state["groups"][0]["lr"] *= 2
        path.write_text(json.dumps(state))
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
    partial = only_state(tmp_path) / ".tmp-0123abcd-step-00000005"
    shutil.copytree(only_state(tmp_path) / "step-00000004", partial)
    (partial / "state.json").unlink()
    _, log, seen = run(model, examples, tmp_path)
    assert len(seen) == 22
    assert log[-1][0] == 15
    assert not partial.exists()


def test_where_all_are_damaged_a_training_starts_anew_and_can_be_killed_again(tiny_model, tmp_path):
    """What is damaged is of later steps, and must not count as the newest."""
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, log, _ = run(model, examples)
    run(model, examples, tmp_path, stop_at=12)
    for path in only_state(tmp_path).iterdir():
        (path / "state.safetensors").unlink()
    assert len(run(model, examples, tmp_path, stop_at=5)[2]) == 10
    resumed, again, seen = run(model, examples, tmp_path)
    assert len(seen) == 22
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": "other"},
        {"options": dataclasses.replace(OPTIONS, learning_rate=2e-2)},
        {"options": dataclasses.replace(OPTIONS, weights=Weights(1.0, 1.0, 0.5))},
        {"options": dataclasses.replace(OPTIONS, seed=2)},
    ],
)
def test_checkpoints_of_other_settings_or_inputs_are_ignored_and_kept_until_a_training_has_ended(
    tiny_model, tmp_path, caplog, change
):
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, log, whole = run(model, examples)
    run(model, examples, tmp_path, stop_at=3)
    first = only_state(tmp_path)
    with caplog.at_level("INFO", "sdtp"):
        _, other, seen = run(model, examples, tmp_path, stop_at=1, **change)
    assert f"{tmp_path} has checkpoints of other settings" in caplog.text
    assert len(seen) == 2
    assert [row[0] for row in other] == [0, 1]
    assert sorted(path.name for path in first.iterdir()) == ["step-00000001", "step-00000002"]
    # Changed back, it goes on where it was.
    resumed, again, rest = run(model, examples, tmp_path)
    assert rest == whole[4:]
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    # It has ended: the other's are gone, and its own are those of the end.
    assert only_state(tmp_path) == first
    assert sorted(path.name for path in first.iterdir()) == ["step-00000014", "step-00000015"]


@pytest.mark.parametrize("recomputing", [False, True])
def test_a_training_goes_on_recomputing_or_not_to_the_same_pruner(tiny_model, tmp_path, recomputing):
    model = tiny_model()
    examples = make_examples(model, 10)
    weights, log, seen = run(model, examples)
    options = [dataclasses.replace(OPTIONS, gradient_checkpointing=value) for value in (not recomputing, recomputing)]
    run(model, examples, tmp_path, stop_at=8, options=options[0])
    resumed, again, rest = run(model, examples, tmp_path, options=options[1])
    assert rest == seen[14:]
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_how_often_to_checkpoint_can_be_changed_under_way(tiny_model, tmp_path):
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, log, _ = run(model, examples, options=dataclasses.replace(OPTIONS, steps=6))
    run(model, examples, tmp_path, stop_at=5, options=dataclasses.replace(OPTIONS, steps=6, checkpoint_every=2))
    often = dataclasses.replace(OPTIONS, steps=6, checkpoint_every=1)
    resumed, again, seen = run(model, examples, tmp_path, options=often)
    assert len(seen) == 2 * 2  # steps 5 and 6
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


SETTINGS = {"width": 8, "position": True, "question_rank": 8, "neighbours": 1, "recency": 0.25}


@pytest.mark.parametrize(
    "change",
    [
        {"width": 9},
        {"position": False},
        {"question_rank": 16},
        {"neighbours": 2},
        {"recency": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_checkpoints_of_a_scorer_of_other_settings_are_ignored(tiny_model, tmp_path, change):
    """Also where the weights have the same shapes."""
    # Every setting but what the model and the schedule decide: one that is new has to be tried here.
    assert inspect.signature(Learned).parameters.keys() == {"hidden_size", "stages", *SETTINGS}
    model = tiny_model()
    examples = make_examples(model, 4)
    options = dataclasses.replace(OPTIONS, steps=2)

    def train(folder, **settings):
        torch.manual_seed(3)
        return run(model, examples, folder, options=options, scorer=Learned(32, SCHEDULE.stages, **settings))

    train(tmp_path, **SETTINGS)
    assert train(tmp_path, **SETTINGS)[2] == []  # there is nothing left to do
    changed, log, seen = train(tmp_path, **{**SETTINGS, **change})
    assert len(seen) == 4
    anew, expected, _ = train(None, **{**SETTINGS, **change})
    assert log == expected
    assert all(torch.equal(changed[name], value) for name, value in anew.items())


def test_checkpoints_of_other_library_versions_are_ignored(tiny_model, tmp_path, monkeypatch):
    model = tiny_model()
    examples = make_examples(model, 4)
    run(model, examples, tmp_path, stop_at=3)
    monkeypatch.setitem(trainer._LIBRARIES, "torch", "1.0")
    _, _, seen = run(model, examples, tmp_path, stop_at=1)
    assert len(seen) == 2


def test_checkpoints_hold_no_pickle(tiny_model, tmp_path):
    model = tiny_model()
    run(model, make_examples(model, 4), tmp_path, stop_at=3)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"state.json", "state.safetensors"}
    state = json.loads((only_state(tmp_path) / "step-00000002" / "state.json").read_text())
    assert state["step"] == 2
    assert state["rates"]["last_epoch"] == 2


def weights_hash(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def test_the_backbone_never_changes_and_gets_no_gradient(tiny_model):
    model = tiny_model()
    before = weights_hash(model)
    options = dataclasses.replace(OPTIONS, steps=4, label_epochs=2)
    weights, log, _ = run(model, make_examples(model, 4), options=options)
    assert [entry[1] for entry in log[:3]] == ["labels", "labels", "heldout"]
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


def test_a_batch_is_the_mean_of_its_examples(tiny_model):
    """Each update is AdamW's on the gradients of the batch's examples, averaged by hand and clipped to norm 1."""
    model = tiny_model()
    examples = make_examples(model, 3)
    options = dataclasses.replace(OPTIONS, steps=4, batch_size=3, weights=Weights(16.0, 4.0, 8.0))
    weights, log, _ = run(model, examples, options=options)
    logged = [metrics for _, split, metrics in log if split == "train"]

    scorer = make_scorer()
    policy = MaskingPolicy(SCHEDULE, scorer, options.temperature)
    optimizer = torch.optim.AdamW(scorer.parameters(), weight_decay=0.01)
    parameters = list(scorer.parameters())
    # From its peak, in the first of four updates, the rate falls to what would be 0 in a fifth.
    for epoch, rate in enumerate(5e-3 * (1 + math.cos(math.pi * update / 4)) for update in range(4)):
        losses, gradients = [], []
        for example in examples:  # one epoch each, in any order: a sum
            loss = example_losses(model, policy, example, options.weights, (options.seed, epoch))["loss"]
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, parameters))
        mean = [torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)]
        norm = torch.cat([gradient.flatten() for gradient in mean]).norm().item()
        assert norm > 1  # clipping has something to do
        assert logged[epoch]["gradient_norm"] == pytest.approx(norm, rel=1e-3)
        assert logged[epoch]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
        assert logged[epoch]["learning_rate"] == pytest.approx(rate)
        for parameter, gradient in zip(parameters, mean, strict=True):
            parameter.grad = gradient / norm
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    # AdamW divides a gradient by its own size: of one near 0, rounding moves a weight by more than of the others.
    differences = torch.cat([(weights[name] - value).abs().flatten() for name, value in scorer.state_dict().items()])
    assert differences.median() < 1e-6
    assert differences.max() < 1e-4


def test_noise_is_keyed_by_seed_epoch_example_and_stage_and_held_out_examples_get_none(tiny_model, monkeypatch):
    model = tiny_model()
    examples = make_examples(model, 3)
    options = dataclasses.replace(OPTIONS, steps=3, label_epochs=1)
    calls = []
    true_noise = objective.gumbel_noise

    def recorded(*key):
        calls.append(key)
        return true_noise(*key)

    monkeypatch.setattr(objective, "gumbel_noise", recorded)
    weights, _, _ = run(model, examples, options=options)
    expected = []
    for epoch in range(2):  # six samples
        for index in epoch_order(OPTIONS.seed, epoch, (23, 24, 25), OPTIONS.batch_size):
            expected += [(OPTIONS.seed, epoch, f"example-{index}", stage, 20 + index) for stage in range(2)]
    assert calls == expected
    # And it is what the stages choose by.
    monkeypatch.setattr(objective, "gumbel_noise", lambda *key: torch.zeros(key[-1]))
    quiet, _, _ = run(model, examples, options=options)
    assert not torch.equal(quiet["mlps.0.0.weight"], weights["mlps.0.0.weight"])


def test_learning_rate_rises_and_falls(tiny_model):
    model = tiny_model()
    _, log, _ = run(model, make_examples(model, 2), options=dataclasses.replace(OPTIONS, steps=20, batch_size=1))
    rates = [metrics["learning_rate"] for _, split, metrics in log if split == "train"]
    assert rates[0] == pytest.approx(0.5e-2)
    assert rates[1] == pytest.approx(1e-2)
    assert rates[10] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 9 / 19)) / 2)
    assert rates[19] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 18 / 19)) / 2)
    assert rates[19] > 5e-5


def test_one_step_trains(tiny_model):
    model = tiny_model()
    options = dataclasses.replace(OPTIONS, steps=1)
    weights, log, _ = run(model, make_examples(model, 2), options=options)
    (rate,) = [metrics["learning_rate"] for _, split, metrics in log if split == "train"]
    assert rate == 1e-2
    before = make_scorer().state_dict()["mlps.0.0.weight"]
    # AdamW's first update moves a weight by the rate, whatever its gradient.
    assert (weights["mlps.0.0.weight"] - before).abs().median().item() == pytest.approx(1e-2, rel=0.01)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("fault", ["not finite", "shape"])
def test_bad_labels_are_named_before_anything_is_trained(tiny_model, split, fault):
    model = tiny_model()
    examples = {"train": make_examples(model, 3), "heldout": make_examples(model, 2, "held")}
    bad = examples[split][-1]
    if fault == "shape":
        examples[split][-1] = dataclasses.replace(bad, saliency=bad.saliency[:, 1:])
    else:
        bad.saliency[1, 4] = torch.nan
    scorer, log = make_scorer(), Recorder()
    with pytest.raises(UserError, match=f"example '{bad.id}': saliency .*{fault}"):
        fit(model, scorer, SCHEDULE, **examples, options=dataclasses.replace(OPTIONS, label_epochs=1), log=log)
    assert log == []
    assert all(torch.equal(value, make_scorer().state_dict()[name]) for name, value in scorer.state_dict().items())


def test_a_non_finite_gradient_stops_before_the_update_and_is_named(tiny_model):
    """The loss of the fourth forward is sound, its gradient is not."""
    model = tiny_model()
    examples = make_examples(model, 4)
    after_one, _, _ = run(model, examples, stop_at=1)
    forwards = []

    def spoil(module, args, output):
        forwards.append(None)
        if len(forwards) == 4:
            output.register_hook(lambda gradient: gradient * torch.nan)

    model.model.layers[2].register_forward_hook(spoil)
    scorer = make_scorer()
    fourth = f"example-{epoch_order(OPTIONS.seed, 0, (23, 24, 25, 26), OPTIONS.batch_size)[3]}"
    with pytest.raises(UserError, match=f"gradient of example '{fourth}' in step 2 has norm nan"):
        fit(model, scorer, SCHEDULE, examples, [], OPTIONS, Recorder())
    for name, value in scorer.state_dict().items():
        assert torch.equal(value, after_one[name])


def short_example(model, tokens=3):
    """A prompt that the schedule protects whole."""
    (example,) = make_examples(model, 1, "short")
    return dataclasses.replace(
        example, prompt_ids=example.prompt_ids[:tokens], saliency=example.saliency[:, :tokens].contiguous()
    )


def test_cross_entropy_alone_trains_on_with_a_prompt_too_short_for_a_choice(tiny_model):
    model = tiny_model()
    options = dataclasses.replace(OPTIONS, steps=4, batch_size=1, weights=Weights(1.0, 0.0, 0.0))
    log = Recorder()
    fit(model, make_scorer(), SCHEDULE, [short_example(model), *make_examples(model, 1)], [], options, log)
    short_first = epoch_order(OPTIONS.seed, 0, (6, 23), 1)[0] == 0
    norms = [metrics["gradient_norm"] for _, _, metrics in log[:2]]
    assert [norm == 0.0 for norm in norms] == [short_first, not short_first]


def test_held_out_agreement_is_the_mean_over_prompts_with_a_choice(tiny_model):
    model = tiny_model()
    policy = MaskingPolicy(SCHEDULE, make_scorer())
    first, second = make_examples(model, 2)
    short = short_example(model)
    alone = [HeldOut(model, [example], Processes(cpu=True)).evaluate(policy) for example in (first, second)]
    found = HeldOut(model, [first, short, second], Processes(cpu=True)).evaluate(policy)
    for name in ("tau", "overlap"):
        assert found[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2)
    short_ce = 3 * found["ce"] - alone[0]["ce"] - alone[1]["ce"]
    logits = model(torch.cat([short.prompt_ids, short.response_ids])[None]).logits[0, 2:5]
    own = torch.nn.functional.cross_entropy(logits, short.response_ids)
    assert short_ce == pytest.approx(own.item(), rel=1e-4)


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_held_out_prompts_that_are_all_too_short_are_refused_before_any_forward(tiny_model, monkeypatch, on_a_gpu):
    model = tiny_model()
    examples, heldout = make_examples(model, 3), [short_example(model), short_example(model, 2)]
    forwards = []
    model.model.layers[0].register_forward_hook(lambda *args: forwards.append(None))
    monkeypatch.setattr(trainer, "_memory_is_fixed", lambda device: on_a_gpu)
    with pytest.raises(UserError, match=r"any of the 2 held-out prompts, the longest of 3 tokens"):
        fit(model, make_scorer(), SCHEDULE, examples, heldout, LABELS, Recorder())
    assert forwards == []


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


LABELS = dataclasses.replace(OPTIONS, steps=3, label_epochs=5, label_examples=3)


@pytest.fixture
def updates(monkeypatch):
    """Which examples the label epochs were updated by, in their order; every epoch is followed by a checkpoint."""
    monkeypatch.setattr(trainer, "_SAVING", 1e9)
    seen = []
    true = label_fit._loss

    def watched(*args):
        seen.append(args[3].id)
        return true(*args)

    monkeypatch.setattr(label_fit, "_loss", watched)
    return seen


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5])
def test_a_run_killed_in_the_label_epochs_goes_on_with_the_next_to_the_bit(tiny_model, tmp_path, updates, stop_at):
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, log, _ = run(model, examples, options=LABELS)
    whole = list(updates)
    assert len(whole) == 15

    # Killed while an epoch was reported, before its checkpoint.
    run(model, examples, tmp_path, stop_at=stop_at, stop_in="labels", options=LABELS)
    there = [f"labels-{epoch:08d}" for epoch in (stop_at - 2, stop_at - 1) if epoch > 0]
    there_is = only_state(tmp_path).iterdir() if there else tmp_path.iterdir()
    assert sorted(path.name for path in there_is) == there
    updates.clear()
    resumed, again, _ = run(model, examples, tmp_path, options=LABELS)
    assert updates == whole[3 * (stop_at - 1) :]
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert sorted(path.name for path in only_state(tmp_path).iterdir()) == ["step-00000002", "step-00000003"]


def test_a_run_killed_after_the_last_label_epoch_computes_no_state_again(tiny_model, tmp_path, updates, monkeypatch):
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, log, _ = run(model, examples, options=LABELS)
    run(model, examples, tmp_path, stop_at=0, stop_in="heldout", options=LABELS)
    state = json.loads((only_state(tmp_path) / "labels-00000005" / "state.json").read_text())
    assert (state["part"], state["step"], len(state["history"])) == ("labels", 5, 5)
    updates.clear()
    monkeypatch.setattr(trainer, "stored_states", None)  # is not called
    monkeypatch.setattr(label_fit, "available_memory", lambda: 0)  # and no memory is asked for
    resumed, again, _ = run(model, examples, tmp_path, options=LABELS)
    assert updates == []
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_a_damaged_checkpoint_of_the_label_epochs_gives_way_to_the_one_before(tiny_model, tmp_path, updates, caplog):
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, log, _ = run(model, examples, options=LABELS)
    run(model, examples, tmp_path, stop_at=4, stop_in="labels", options=LABELS, tracking_run="first")
    (only_state(tmp_path) / "labels-00000003" / "state.json").write_text("{")
    updates.clear()
    with caplog.at_level("INFO", "sdtp"):
        resumed, again, _ = run(model, examples, tmp_path, options=LABELS)
    assert "going on from label epoch 2, reached by tracking run first" in caplog.text
    assert len(updates) == 9
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_checkpoints_of_the_label_epochs_take_a_small_share_of_their_time(tiny_model, tmp_path, monkeypatch):
    """Epochs of 6 seconds, checkpoints of 1: a twentieth is one after 20 seconds. Results are the same."""
    model = tiny_model()
    examples = make_examples(model, 4)
    options = dataclasses.replace(LABELS, label_epochs=12)
    weights, log, _ = run(model, examples, options=options)
    clock = SimpleNamespace(now=5.0)
    loss, save, saved = label_fit._loss, Checkpoints.save, []

    def slow_loss(*args):
        clock.now += 2
        return loss(*args)

    def slow_save(store, part, step, *rest):
        clock.now += 1
        saved.append((part, step))
        return save(store, part, step, *rest)

    monkeypatch.setattr(label_fit, "_loss", slow_loss)
    monkeypatch.setattr(Checkpoints, "save", slow_save)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    found, again, _ = run(model, examples, tmp_path, options=options)
    # The first, whose cost is not known before it, and the last always.
    assert [step for part, step in saved if part == "labels"] == [1, 5, 9, 12]
    assert again == log
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_what_needs_most_memory_is_tried_first_on_a_gpu_and_changes_nothing(tiny_model, tmp_path, monkeypatch):
    """Every time training starts, before the states for the label epochs; on the CPU it is not."""
    model = tiny_model()
    examples = make_examples(model, 4)
    examples[1] = dataclasses.replace(examples[1], response_ids=torch.arange(3, 8))
    examples[0] = dataclasses.replace(examples[0], response_ids=torch.arange(3, 8))  # as long, its prompt is shorter
    examples.insert(2, make_examples(model, 9)[8])
    options = dataclasses.replace(LABELS, steps=8)
    weights, log, plain = run(model, examples, options=options)
    tried = ["example-8", "example-1"]  # the longest, and the longest prompt of those with the longest response
    assert plain[:3] == ["example-0", "example-1", "example-8"]  # of the label epochs
    monkeypatch.setattr(trainer, "_memory_is_fixed", lambda device: True)
    _, _, first = run(model, examples, tmp_path, stop_at=5, options=options)
    assert first == [*tried, *plain[: 3 + 5 * 2]]
    resumed, again, rest = run(model, examples, tmp_path, options=options)
    assert rest == [*tried, *plain[3 + 4 * 2 :]]
    assert again == log
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert run(model, examples, tmp_path, options=options)[2] == []  # has ended


@pytest.mark.parametrize("tried", [False, True])
def test_an_example_that_needs_more_memory_than_there_is_is_named(tiny_model, monkeypatch, tried):
    model = tiny_model()
    examples = make_examples(model, 4)

    def limit(module, args, output):
        if output[0].shape[-2] > 24:  # the last response token is not run
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model.model.layers[3].register_forward_hook(limit)
    monkeypatch.setattr(trainer, "_memory_is_fixed", lambda device: tried)
    scorer, log = make_scorer(), Recorder()
    expected = "example 'example-3', of 23 prompt and 3 response tokens: training.gradient_checkpointing: true takes"
    with pytest.raises(UserError, match=expected):
        fit(model, scorer, SCHEDULE, examples, [], LABELS, log)
    assert bool(log) != tried  # nothing has been trained by then, or the label epochs and maybe a step


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_states_that_would_not_fit_end_a_training_before_its_first_forward(
    tiny_model, tmp_path, updates, monkeypatch, on_a_gpu, resumed
):
    """On a GPU before what needs most memory there is tried; states are computed again by a run that goes on."""
    model = tiny_model()
    examples = make_examples(model, 4)
    forwards = []
    monkeypatch.setattr(trainer, "_memory_is_fixed", lambda device: on_a_gpu)

    def train(log):
        fit(model, make_scorer(), SCHEDULE, examples, [], LABELS, log, tmp_path)

    if resumed:
        with pytest.raises(KeyboardInterrupt):
            train(Recorder(3, "labels"))
    hook = model.model.layers[0].register_forward_hook(lambda *args: forwards.append(None))
    # 2 stages of 32 numbers of 2 bytes; of the four examples the first three, of 20, 21 and 22 tokens.
    needed = 2 * 32 * 2 * (20 + 21 + 22)
    monkeypatch.setattr(label_fit, "available_memory", lambda: (needed - 1) / 0.9)
    with pytest.raises(UserError, match=r"training\.label_examples: the hidden states of 3 examples take"):
        train(Recorder())
    assert forwards == []
    hook.remove()
    monkeypatch.setattr(label_fit, "available_memory", lambda: (needed + 1) / 0.9)
    train(Recorder())


class Second(Processes):
    """Not the main process."""

    def __init__(self, cpu):
        super().__init__(cpu)
        self.main = False


@pytest.mark.parametrize(("label_examples", "main"), [(3, True), (3, False), (4, True), (9, True)])
def test_a_training_says_once_that_labels_are_learned_from_a_part(
    tiny_model, tmp_path, caplog, monkeypatch, label_examples, main
):
    model = tiny_model()
    options = dataclasses.replace(LABELS, label_examples=label_examples, label_epochs=2)
    if not main:
        monkeypatch.setattr(trainer, "Processes", Second)
    with caplog.at_level("INFO", "sdtp"):
        run(model, make_examples(model, 4), options=options)
    said = [record.getMessage() for record in caplog.records if "passes over labels" in record.getMessage()]
    words = "the passes over labels learn from the first 3 of 4 training examples (training.label_examples)"
    assert said == ([words] if label_examples == 3 and main else [])


def test_patience_stops_and_keeps_the_best_evaluations_scorer(tiny_model, tmp_path, caplog):
    """A rate far too high: the scorer it starts from is soon better than what training makes of it."""
    model = tiny_model()
    examples = make_examples(model, 4)
    options = dataclasses.replace(
        OPTIONS, steps=40, evaluate_every=2, patience=3, learning_rate=3.0, checkpoint_every=3
    )
    weights, log, seen = run(model, examples, options=options)
    divergences = [(metrics["kl"], step) for step, split, metrics in log if split == "heldout"]
    best = min(divergences)[1]
    last = divergences[-1][1]
    assert last == best + 3 * 2 < 40
    assert log[-1][:2] == (last, "heldout")
    assert len(seen) == last * 2
    scorer = make_scorer()
    evaluated = HeldOut(model, make_examples(model, 2, "held"), Processes(cpu=True))
    scorer.load_state_dict(weights)
    assert evaluated.evaluate(MaskingPolicy(SCHEDULE, scorer, options.temperature))["kl"] == min(divergences)[0]

    assert f"stopped after step {last} of 40: 3 evaluations without a lower held-out kl" in caplog.text
    # A kill at any step changes nothing, nor does asking once more.
    for stop_at in (1, last - 1, last):
        folder = tmp_path / str(stop_at)
        run(model, examples, folder, stop_at=stop_at, options=options)
        resumed, again, _ = run(model, examples, folder, options=options)
        assert again == log
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    finished, again, none = run(model, examples, folder, options=options)
    assert none == []
    assert again == log
    assert all(torch.equal(finished[name], weights[name]) for name in weights)


def test_what_fit_returns_are_the_metrics_of_the_scorer_it_leaves(tiny_model):
    model = tiny_model()
    examples, held = make_examples(model, 4), make_examples(model, 2, "held")
    for patience in (0, 2):
        options = dataclasses.replace(OPTIONS, steps=12, evaluate_every=1, patience=patience, learning_rate=1.0)
        scorer = make_scorer()
        final = fit(model, scorer, SCHEDULE, examples, held, options, Recorder())
        policy = MaskingPolicy(SCHEDULE, scorer, options.temperature)
        assert HeldOut(model, held, Processes(cpu=True)).evaluate(policy) == final


def test_patience_needs_held_out_examples(tiny_model):
    model = tiny_model()
    options = dataclasses.replace(OPTIONS, patience=2)
    with pytest.raises(UserError, match=r"training\.patience is 2, but there is no held-out example"):
        fit(model, make_scorer(), SCHEDULE, make_examples(model, 2), [], options, Recorder())


def test_a_run_says_whose_work_it_goes_on_with(tiny_model, tmp_path, caplog):
    model = tiny_model()
    examples = make_examples(model, 4)
    run(model, examples, tmp_path, stop_at=4, tracking_run="first")
    state = only_state(tmp_path)
    assert json.loads((state / "step-00000003" / "state.json").read_text())["tracking_run"] == "first"
    with caplog.at_level("INFO", "sdtp"):
        run(model, examples, tmp_path, tracking_run="second")
    assert "going on from step 3, reached by tracking run first" in caplog.text
    assert json.loads((state / "step-00000015" / "state.json").read_text())["tracking_run"] == "second"


def test_no_state_of_a_random_generator_is_of_any_account(tiny_model, tmp_path):
    model = tiny_model()
    examples = make_examples(model, 4)
    weights, _, _ = run(model, examples)
    run(model, examples, tmp_path, stop_at=8)
    scorer = make_scorer()
    torch.manual_seed(99)
    fit(model, scorer, SCHEDULE, examples, make_examples(model, 2, "held"), OPTIONS, Recorder(), tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in scorer.state_dict().items())


def test_the_pruner_of_a_checkpoint_is_the_one_its_callback_sees(tiny_model, tmp_path):
    model = tiny_model()
    scorer, seen = make_scorer(), {}

    def keep(step):
        seen[step] = {name: value.clone() for name, value in scorer.state_dict().items()}

    options = dataclasses.replace(OPTIONS, steps=5, checkpoint_every=2, label_epochs=2)  # not of these
    fit(model, scorer, SCHEDULE, make_examples(model, 4), [], options, Recorder(), tmp_path, on_checkpoint=keep)
    assert sorted(seen) == [0, 2, 4, 5]
    stored = load_file(only_state(tmp_path) / "step-00000004" / "state.safetensors")
    assert all(torch.equal(stored[f"module/{name}"], value) for name, value in seen[4].items())
    # Who goes on from a checkpoint is told of it too: the one who made it may have been killed before.
    last = seen.pop(5)
    scorer.load_state_dict(make_scorer().state_dict())
    seen.clear()
    fit(model, scorer, SCHEDULE, make_examples(model, 4), [], options, Recorder(), tmp_path, on_checkpoint=keep)
    assert sorted(seen) == [5]
    assert all(torch.equal(last[name], value) for name, value in seen[5].items())


@pytest.mark.parametrize(
    ("weights", "labels", "losses"),
    [
        (Weights(ce=1.0, mse=1.0, rank=0.0), 2, {"ce", "mse"}),  # without rank
        (Weights(ce=1.0, mse=0.0, rank=0.0), 0, {"ce"}),  # without rank and MSE: labels have nothing to say
        (Weights(ce=0.0, mse=0.0, rank=0.0, kl=1.0), 0, {"kl"}),
    ],
)
def test_losses_left_out_take_no_part_in_the_label_epochs_either(tiny_model, monkeypatch, weights, labels, losses):
    model = tiny_model()
    examples = make_examples(model, 3)
    if not labels:
        monkeypatch.setattr(trainer, "stored_states", None)  # is not called
    options = dataclasses.replace(OPTIONS, steps=2, label_epochs=2, weights=weights)
    scorer, log, _ = run(model, examples, options=options)
    assert [split for _, split, _ in log].count("labels") == labels
    trained = [metrics for _, split, metrics in log if split == "train"]
    assert all(metrics.keys() - {"loss", "gradient_norm", "learning_rate"} == losses for metrics in trained)
    assert not torch.equal(scorer["mlps.1.0.weight"], make_scorer().state_dict()["mlps.1.0.weight"])
    if losses == {"ce", "mse"}:
        # MSE alone in the label epochs: what rank would have added is missing.
        ranked, _, _ = run(
            model, examples, options=dataclasses.replace(options, weights=dataclasses.replace(weights, rank=1.0))
        )
        assert not torch.equal(ranked["mlps.1.0.weight"], scorer["mlps.1.0.weight"])


def test_the_sampler_is_part_of_what_is_trained(tiny_model, tmp_path):
    model = tiny_model()
    examples = make_examples(model, 3)
    options = {sampler: dataclasses.replace(OPTIONS, steps=3, sampler=sampler) for sampler in SAMPLERS}
    ends = {sampler: run(model, examples, options=options[sampler])[0] for sampler in SAMPLERS}
    assert not torch.equal(*(weights["mlps.1.0.weight"] for weights in ends.values()))
    # A checkpoint of one is of no use to the other.
    run(model, examples, tmp_path, stop_at=2, options=options["gumbel_topk"])
    found, _, _ = run(model, examples, tmp_path, options=options["gumbel_softmax"])
    assert all(torch.equal(found[name], value) for name, value in ends["gumbel_softmax"].items())
