"""Losses against their definitions, written as double loops in float64."""

import math

import pytest
import torch

from sdtp.training import losses, pairwise_ranking
from sdtp.training.losses import standardise, standardised_mse


def double_loop(scores, target):
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if target[i] > target[j]:
                total = total + torch.log1p(torch.exp(-(scores[i] - scores[j])))
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("tokens", [2, 5, 41])
@pytest.mark.parametrize("block", [1, 7, 256])
def test_ranking_is_the_double_loop_in_value_and_gradient(monkeypatch, tokens, block):
    monkeypatch.setattr(losses, "_BLOCK", block)
    scores = torch.randn(tokens, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 1 + tokens // 2, (tokens,)).double()  # with ties
    target[0] = -1
    expected = double_loop(scores, target)
    (expected_gradient,) = torch.autograd.grad(3 * expected, scores)
    found = pairwise_ranking(scores, target)
    (gradient,) = torch.autograd.grad(3 * found, scores)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    single = scores.detach().float().requires_grad_(True)
    (3 * pairwise_ranking(single, target)).backward()
    torch.testing.assert_close(single.grad.double(), expected_gradient, rtol=0, atol=1e-6)


def test_ranking_of_two_tokens_by_hand():
    scores = torch.tensor([1.0, 3.0])
    assert pairwise_ranking(scores, torch.tensor([0.0, 1.0])).item() == pytest.approx(math.log1p(math.exp(-2)))
    assert pairwise_ranking(scores, torch.tensor([1.0, 0.0])).item() == pytest.approx(math.log1p(math.exp(2)))


def test_ranking_leaves_ties_out_of_the_mean():
    # Pairs: 1>0 twice (the two zeros tie with each other).
    found = pairwise_ranking(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert found.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2)


@pytest.mark.parametrize("target", [[], [5.0], [2.0, 2.0, 2.0]])
def test_ranking_without_pairs_is_zero_on_the_graph(target):
    scores = torch.randn(len(target), requires_grad=True)
    loss = pairwise_ranking(scores, torch.tensor(target))
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(scores.grad, torch.zeros(len(target)))


def test_ranking_of_large_differences_stays_finite():
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = pairwise_ranking(scores, torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.item() == 2e4
    torch.testing.assert_close(scores.grad, torch.tensor([1.0, -1.0]))


def test_ranking_gives_no_gradient_to_the_target_and_keeps_the_dtype():
    scores = torch.randn(6, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randn(6, requires_grad=True)
    loss = pairwise_ranking(scores, target)
    loss.backward()
    assert loss.dtype == scores.grad.dtype == torch.bfloat16
    assert target.grad is None


@pytest.mark.parametrize(("scores", "target"), [((3,), (4,)), ((2, 3), (2, 3)), ((), ())])
def test_ranking_refuses_other_shapes(scores, target):
    with pytest.raises(ValueError, match=r"both must be \[n\]"):
        pairwise_ranking(torch.zeros(scores), torch.zeros(target))


def test_ranking_refuses_nan_which_would_form_no_pair():
    with pytest.raises(ValueError, match="target has 1 NaN of 3"):
        pairwise_ranking(torch.zeros(3), torch.tensor([1.0, torch.nan, 0.0]))


def test_standardised_saliency_has_the_quantiles_of_its_ranks():
    normal = torch.distributions.Normal(0.0, 1.0)
    found = standardise(torch.tensor([1e6, 0.0, 1e-9]))
    torch.testing.assert_close(found, normal.icdf(torch.tensor([5 / 6, 1 / 6, 3 / 6])), rtol=0, atol=1e-6)
    tied = standardise(torch.tensor([-2.0, 7.0, 7.0, 9.0]))
    torch.testing.assert_close(tied, normal.icdf(torch.tensor([1 / 8, 1 / 2, 1 / 2, 7 / 8])), rtol=0, atol=1e-6)
    assert torch.equal(standardise(torch.full((4,), 3.0)), torch.zeros(4))
    wide = standardise(torch.rand(512).exp())
    assert abs(wide.mean().item()) < 1e-6
    assert abs(wide.std().item() - 1) < 0.02


def test_mse_is_the_mean_square():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = standardised_mse(scores, torch.tensor([0.0, -1.0]))
    loss.backward()
    assert loss.item() == 5.0
    assert torch.equal(scores.grad, torch.tensor([1.0, 3.0]))
