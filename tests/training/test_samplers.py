"""How training draws the tokens that stay."""

import math

import pytest
import torch
from scipy.stats import kstest
from scipy.stats import logistic as logistic_distribution

from sdtp.training.samplers import gumbel_noise, gumbel_softmax, gumbel_topk, highest, logistic


def test_noise_depends_on_all_of_its_key_and_on_nothing_else():
    torch.manual_seed(1)
    first = gumbel_noise(0, 0, "a", 0, 64)
    torch.manual_seed(2)
    assert torch.equal(gumbel_noise(0, 0, "a", 0, 64), first)
    for key in ((1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)):
        assert not torch.equal(gumbel_noise(*key, 64), first)
    many = gumbel_noise(0, 0, "a", 0, 100_000)
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert many.var().item() == pytest.approx(1.6449, abs=0.05)  # pi^2 / 6


def test_logistic_noise_is_distributed_as_the_difference_of_two_gumbels():
    first, second = gumbel_noise(0, 0, "a", 0, 50_000), gumbel_noise(0, 0, "b", 0, 50_000)
    for sample in (logistic(first), first - second):
        assert kstest(sample.numpy(), logistic_distribution.cdf).pvalue > 0.01
    # In the tails as well: the quantile of the one for that of the other.
    gumbel = torch.tensor([-3.0, 0.0, 20.0, 80.0])
    x = [math.exp(-g) for g in gumbel.tolist()]
    expected = [-value - math.log(-math.expm1(-value)) for value in x]
    assert logistic(gumbel).tolist() == pytest.approx(expected, rel=1e-5)
    assert logistic(gumbel)[-1].item() == pytest.approx(80.0)


def test_relaxed_masks_are_those_of_softmax_over_a_keep_and_a_drop_logit():
    """P(kept), and the whole distribution of sigmoid(margin / T), against torch's own gumbel_softmax of two logits."""
    torch.manual_seed(0)
    tokens, temperature = 40_000, 0.6
    keep, drop = 0.8, 0.3
    logits = torch.tensor([[keep, drop]]).expand(tokens, 2)
    theirs = torch.nn.functional.gumbel_softmax(logits, tau=temperature)[:, 0]
    # All scores alike and as many as expected: the level is 0, and the margin the logit's difference with noise.
    budget = round(tokens / (1 + math.exp(drop - keep)))
    scores = torch.full((tokens,), keep - drop)
    free = torch.ones(tokens, dtype=torch.bool)
    kept, margin = gumbel_softmax(scores, free, budget, temperature, gumbel_noise(0, 0, "a", 0, tokens))
    ours = torch.sigmoid(margin / temperature)
    assert kstest(ours.numpy(), theirs.numpy()).pvalue > 0.01
    assert torch.equal(kept, ours > 0.5)
    assert kept.float().mean().item() == pytest.approx(budget / tokens, abs=0.01)


@pytest.mark.parametrize("budget", [1, 5, 15, 19])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_gumbel_softmax_keeps_the_budget_on_average_and_each_token_by_its_own_probability(budget, spread):
    torch.manual_seed(0)
    scores = spread * torch.randn(24) + 7
    free = torch.ones(24, dtype=torch.bool).index_fill_(0, torch.tensor([0, 1, 22, 23]), False)
    draws = torch.stack(
        [gumbel_softmax(scores, free, budget, 0.5, gumbel_noise(0, epoch, "a", 0, 24)).kept for epoch in range(400)]
    )
    assert not draws[:, ~free].any()
    counts = draws.sum(1).float()
    assert counts.mean().item() == pytest.approx(budget, abs=0.45)
    if spread < 30:
        assert counts.std() > 0.5  # it varies
    _, margin = gumbel_softmax(
        scores, free, budget, 0.5, torch.full((24,), -math.log(math.log(2)))
    )  # no noise: u = 1/2
    assert margin[free].sigmoid().sum().item() == pytest.approx(budget, abs=1e-3)
    torch.testing.assert_close(draws[:, free].float().mean(0), margin[free].sigmoid(), rtol=0, atol=0.1)


@pytest.mark.parametrize("sampler", [gumbel_topk, gumbel_softmax])
def test_the_margin_has_the_scores_gradient_and_its_sign_says_what_is_kept(sampler):
    torch.manual_seed(0)
    scores = torch.randn(30, requires_grad=True)
    free = torch.rand(30) > 0.3
    kept, margin = sampler(scores, free, 8, 0.7, gumbel_noise(0, 0, "a", 0, 30))
    assert torch.equal(kept, free & (margin > 0))
    if sampler is gumbel_topk:
        assert kept.sum() == 8
    (gradient,) = torch.autograd.grad(margin.sum(), scores)
    assert torch.equal(gradient, torch.ones(30))  # where the cut lies is a constant


@pytest.mark.parametrize("sampler", [gumbel_topk, gumbel_softmax])
def test_with_room_for_protected_tokens_alone_no_other_is_kept(sampler):
    free = torch.tensor([False, True, True, False])
    kept, margin = sampler(torch.arange(4.0), free, 0, 1.0, gumbel_noise(0, 0, "a", 0, 4))
    assert not kept.any()
    assert margin.isfinite().all()


def test_the_highest_are_those_pruning_takes_ties_included():
    scores = torch.tensor([5.0, 1.0, 3.0, 3.0, 3.0, 0.0])
    kept, margin = highest(scores, torch.tensor([False, True, True, True, True, True]), 2)
    assert kept.nonzero()[:, 0].tolist() == [2, 3]
    assert margin.tolist() == [2.0, -2.0, 0.0, 0.0, 0.0, -3.0]


def test_gumbel_topk_draws_with_the_softmax_of_scores_over_the_temperature():
    scores, free = torch.tensor([0.0, 0.5, 1.0, 9.0]), torch.tensor([True, True, True, False])
    draws = torch.stack(
        [gumbel_topk(scores, free, 1, 0.5, gumbel_noise(0, epoch, "a", 0, 4)).kept for epoch in range(1500)]
    )
    torch.testing.assert_close(draws[:, :3].float().mean(0), (scores[:3] / 0.5).softmax(0), rtol=0, atol=0.05)
