from __future__ import annotations

import pytest
import torch
from scipy.stats import kendalltau

from sdtp.errors import UserError
from sdtp.pruning.scorers import Learned
from sdtp.training import label_fit
from sdtp.training.examples import Example
from sdtp.training.label_fit import check_states_fit, fit_labels, stage_states, stored_states
from sdtp.training.optimizer import adamw
from sdtp.training.processes import Processes
from tests.scoring import keep_scores


def fit(scorer, states, saliency, epochs=30, seed=0, mse=1.0, rank=1.0):
    losses = []
    ids = torch.zeros(1, dtype=torch.long)  # the states say what the tokens were
    examples = [Example(f"e{index}", ids, ids, labels) for index, labels in enumerate(saliency)]
    fit_labels(
        scorer, *adamw(scorer, 1e-2, epochs * len(examples)), dict(enumerate(states)), examples,
        epochs=range(1, epochs + 1), mse=mse, rank=rank, seed=seed,
        log=lambda loss, epoch: losses.append((epoch, loss)), processes=Processes(cpu=True),
    )  # fmt: skip
    return losses


def make_scorer():
    torch.manual_seed(3)
    return Learned(16, 2, width=8)


@pytest.fixture
def data():
    """Three examples of different lengths whose saliency is a function of the states."""
    direction = torch.randn(16)
    states = [torch.randn(2, n, 16).half() for n in (40, 50, 60)]
    return states, [(s.float() @ direction).exp() for s in states]


def test_states_are_those_that_enter_the_layers(tiny_model):
    model = tiny_model()
    ids = torch.randint(3, 128, (20,))
    expected = model(ids[None], output_hidden_states=True).hidden_states
    states = stage_states(model, ids, (1, 3))
    for stage, layer in enumerate((1, 3)):
        hidden = expected[layer][0]
        normed = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(states[stage].float(), normed, atol=2e-3)
        # A scorer divides by the root mean square itself: stored states give it what the model's own give.
        scorer = Learned(32, 2, width=8)
        stored, own = keep_scores(scorer, stage, states[stage]), keep_scores(scorer, stage, hidden)
        assert torch.allclose(stored, own, atol=2e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("mse", "rank"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_scores_come_to_order_tokens_as_saliency_does(data, mse, rank):
    states, saliency = data
    scorer = make_scorer()
    losses = fit(scorer, states, saliency, mse=mse, rank=rank)
    assert [epoch for epoch, _ in losses] == list(range(1, 31))
    assert losses[-1][1] < losses[0][1] / 2
    for stage in range(2):
        scores = keep_scores(scorer, stage, states[0][stage])
        assert kendalltau(scores.detach(), saliency[0][stage]).statistic > 0.8


def test_the_same_seed_gives_the_same_bits_and_another_does_not(data):
    runs = []
    for seed in (0, 0, 1):
        scorer = make_scorer()
        fit(scorer, *data, epochs=2, seed=seed)
        runs.append(scorer.state_dict()["mlps.0.0.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_labels_teach_the_estimates_and_not_what_is_made_of_them(data):
    plain, deciding = make_scorer(), Learned(16, 2, width=8, neighbours=2, recency=0.25)
    deciding.load_state_dict(plain.state_dict(), strict=False)
    for scorer in (plain, deciding):
        fit(scorer, *data, epochs=2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, deciding.state_dict()[name])


@pytest.mark.parametrize(("mse", "rank"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_a_loss_that_is_not_finite_names_example_and_stage(data, mse, rank):
    states, saliency = data
    states[2][1, 0, 0] = torch.inf
    scorer = make_scorer()
    with pytest.raises(UserError, match="loss of example 'e2' at stage 1 in label epoch 1 is nan"):
        fit(scorer, states, saliency, mse=mse, rank=rank)
    assert all(value.isfinite().all() for value in scorer.state_dict().values())


def test_a_gradient_that_is_not_finite_names_the_example_and_changes_no_weight(data):
    """Of a loss that is finite: what a scorer's own function makes of it on the way back."""
    states, saliency = data
    scorer = make_scorer()
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    scorer.mlps[1].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: gradient * torch.inf) and None
    )
    with pytest.raises(UserError, match=r"gradient of example 'e\d' in label epoch 1 has norm (inf|nan)"):
        fit(scorer, states, saliency)
    assert all(torch.equal(value, before[name]) for name, value in scorer.state_dict().items())


def test_every_epoch_has_each_example_once_in_an_order_of_its_own_number(data, monkeypatch):
    """So that a run which goes on with a later epoch has the order that it would have had."""
    states, saliency = data
    ids = torch.zeros(1, dtype=torch.long)
    examples = [Example(f"e{index}", ids, ids, labels) for index, labels in enumerate(saliency)]
    seen = []
    true = label_fit._loss

    def watched(scorer, states, targets, example, *rest):
        seen.append(example.id)
        return true(scorer, states, targets, example, *rest)

    monkeypatch.setattr(label_fit, "_loss", watched)

    def orders(epochs):
        seen.clear()
        scorer = make_scorer()
        fit_labels(
            scorer, *adamw(scorer, 1e-2, 30), dict(enumerate(states)), examples, epochs=epochs, mse=1.0, rank=0.0,
            seed=0, log=lambda loss, epoch: None, processes=Processes(cpu=True),
        )  # fmt: skip
        return [tuple(seen[start : start + 3]) for start in range(0, len(seen), 3)]

    whole = orders(range(1, 9))
    assert all(sorted(order) == ["e0", "e1", "e2"] for order in whole)
    assert len(set(whole)) > 2
    assert orders(range(4, 9)) == whole[3:]


def test_states_take_what_is_asked_for_and_are_refused_where_that_is_not_left(tiny_model, monkeypatch):
    model = tiny_model()
    tokens, one = [20, 30, 40], Processes(cpu=True)
    examples = [Example(f"e{n}", torch.arange(3, 3 + n), torch.tensor([5]), torch.rand(2, n)) for n in tokens]
    # 2 stages of 32 numbers of 2 bytes: 128 bytes a token. Of 9000 bytes that are left 8100 may be used.
    monkeypatch.setattr(label_fit, "available_memory", lambda: 9000)
    words = (
        "the hidden states of 3 examples take 1.15e-05 GB .* 8.1e-06 GB of memory may be used: at most 2 is accepted"
    )
    with pytest.raises(UserError, match=rf"training\.label_examples: {words}"):
        check_states_fit(tokens, 2, 32, one)
    monkeypatch.setattr(label_fit, "available_memory", lambda: 2800)
    with pytest.raises(UserError, match=r"may be used: training\.label_epochs of 0 is accepted"):
        check_states_fit(tokens, 2, 32, one)
    for enough in (90 * 128 / 0.9 + 1, None):  # a system that does not say refuses nothing
        monkeypatch.setattr(label_fit, "available_memory", lambda enough=enough: enough)
        check_states_fit(tokens, 2, 32, one)
    states = stored_states(model, examples, (1, 3), one, lockstep=False)
    assert [states[index].shape for index in range(3)] == [(2, 20, 32), (2, 30, 32), (2, 40, 32)]
    assert sum(value.nbytes for value in states.values()) == 90 * 128


@pytest.mark.parametrize(
    ("hosts", "refused"),
    [
        # Four processes, examples of 100, 200, ..., 600 bytes in turns: 600, 800, 300 and 400 bytes.
        ([("a", 10**4)] * 4, None),
        ([("a", 2112 / 0.9)] * 4, None),
        ([("a", 2096 / 0.9)] * 4, "6 examples take 2.1e-06 GB of memory on a, .*: at most 5 is accepted"),
        (
            [("a", 10**4), ("b", 710 / 0.9), ("a", 10**4), ("c", 10**4)],
            "8e-07 GB of memory on b, .* 5 is accepted",
        ),
        (
            [("a", 10**4), ("b", 190 / 0.9), ("a", 10**4), ("c", 10**4)],
            "8e-07 GB of memory on b, .* 1 is accepted",
        ),
        ([("a", 10**4), ("b", None), ("a", 10**4), ("c", 410 / 0.9)], None),
        ([("a", 10**4), ("b", None), ("a", 10**4), ("c", 390 / 0.9)], "4e-07 GB of memory on c, .* 3 is accepted"),
    ],
)
def test_each_host_has_to_hold_the_states_of_its_own_processes(monkeypatch, hosts, refused):
    one = Processes(cpu=True)
    monkeypatch.setattr(one, "from_all", lambda value: hosts)
    tokens = [25, 50, 75, 100, 125, 150]
    if refused is None:
        check_states_fit(tokens, 1, 2, one)
    else:
        with pytest.raises(UserError, match=refused):
            check_states_fit(tokens, 1, 2, one)
