from __future__ import annotations

import pytest
import torch
from scipy.stats import kendalltau

from sdtp.errors import UserError
from sdtp.pruning.scorers import Learned
from sdtp.training.examples import Example
from sdtp.training.label_fit import fit_labels, stage_states
from sdtp.training.processes import Processes
from tests.scoring import keep_scores


def fit(scorer, states, saliency, epochs=30, seed=0, mse=1.0, rank=1.0):
    losses = []
    ids = torch.zeros(1, dtype=torch.long)  # the states say what the tokens were
    examples = [Example(f"e{index}", ids, ids, labels) for index, labels in enumerate(saliency)]
    fit_labels(
        scorer, dict(enumerate(states)), examples, epochs=epochs, learning_rate=1e-2, mse=mse, rank=rank, seed=seed,
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
