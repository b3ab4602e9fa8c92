"""Losses against their definitions, written as double loops in float64."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def naive(scores, target):
    """The same over the whole pair matrix, for sizes that a double loop has no time for."""
    above = target[:, None] > target
    losses = functional.softplus(scores - scores[:, None], threshold=100)
    return torch.where(above, losses, 0).sum() / above.sum()


def value_and_gradient(loss, scores, target):
    leaf = scores.clone().requires_grad_()
    value = loss(leaf, target)
    (3 * value).backward()
    return value.detach(), leaf.grad


def assert_equal(found, expected, relative):
    """Within `relative` of the largest number: a single gradient may be the difference of two large sums."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= relative * other.abs().max()


@pytest.mark.parametrize("tokens", [2, 5, 41])
@pytest.mark.parametrize("block", [1, 60, 2**19])
def test_ranking_is_the_double_loop_in_value_and_gradient(monkeypatch, tokens, block):
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", block)
    scores = torch.randn(tokens, dtype=torch.float64)
    target = torch.randint(0, 1 + tokens // 2, (tokens,)).double()  # with ties
    target[0] = -1
    expected = value_and_gradient(double_loop, scores, target)
    assert_equal(value_and_gradient(pairwise_ranking, scores, target), expected, 1e-12)
    assert_equal(value_and_gradient(pairwise_ranking, scores.float(), target), expected, 1e-6)


@pytest.mark.parametrize("ties", ["none", "few", "one long"])
@pytest.mark.parametrize("block", [900, 2**19])
def test_ranking_of_many_tokens_is_the_naive_one(monkeypatch, ties, block):
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", block)
    scores = 5 * torch.randn(1000, dtype=torch.float64)
    target = torch.randn(1000).exp().double()
    if ties == "few":
        target = (20 * target).round()
    if ties == "one long":  # longer than a block has rows
        target[torch.randperm(1000)[:300]] = target.median()
    expected = value_and_gradient(naive, scores, target)
    assert_equal(value_and_gradient(pairwise_ranking, scores, target), expected, 1e-12)
    single = scores.float()
    expected = value_and_gradient(naive, single.double(), target)
    assert_equal(value_and_gradient(pairwise_ranking, single, target), expected, 1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-60, 60), st.integers(0, 4)), min_size=2, max_size=24), st.integers(1, 80))
def test_ranking_is_the_naive_one_whatever_the_scores_ties_and_blocks(rows, block):
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    target = torch.tensor([float(target) for _, target in rows], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_BLOCK_ON_CPU", block)
        found = value_and_gradient(pairwise_ranking, scores, target)
    if len(target.unique()) == 1:
        assert torch.equal(found[0], torch.zeros((), dtype=torch.float64))
        assert torch.equal(found[1], torch.zeros_like(scores))
    else:
        assert_equal(found, value_and_gradient(naive, scores, target), 1e-12)


def test_ranking_does_not_depend_on_the_order_of_tokens():
    scores, target = torch.randn(300), torch.randint(0, 40, (300,)).float()
    order = torch.randperm(300)
    value, gradient = value_and_gradient(pairwise_ranking, scores, target)
    shuffled, shuffled_gradient = value_and_gradient(pairwise_ranking, scores[order], target[order])
    torch.testing.assert_close(shuffled, value, rtol=1e-6, atol=0)
    assert_equal([shuffled_gradient], [gradient[order]], 1e-6)


def test_ranking_never_holds_the_pair_matrix(monkeypatch):
    """The largest tensor of forward and backward is one block, and what is kept between them is [n]."""
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", 4096)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            largest = max([largest, *(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))])
            return found

    scores = torch.randn(2000, requires_grad=True)
    with Sizes():
        loss = pairwise_ranking(scores, torch.randn(2000))
        kept = sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors)
        loss.backward()
    assert 2000 < largest <= 4096
    assert kept == 2000


@pytest.mark.parametrize("value", [0.0, torch.inf])
def test_ranking_of_padded_rows_is_that_of_the_tokens_in_them(value):
    """Two rows of 16 tokens, alone and padded to 32 (tensorflow/ranking issue 359: there the loss halved)."""
    rows, targets = torch.randn(2, 16), torch.rand(2, 16)
    alone = torch.stack([pairwise_ranking(row, target) for row, target in zip(rows, targets, strict=True)]).mean()
    real = torch.arange(32) % 2 == 0
    padded = torch.full((2, 32), value).masked_scatter(real.expand(2, 32), rows).requires_grad_()
    labels = torch.full((2, 32), value).masked_scatter(real.expand(2, 32), targets)
    found = torch.stack([pairwise_ranking(padded[row, real], labels[row, real]) for row in range(2)]).mean()
    found.backward()
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)
    assert torch.equal(padded.grad[:, ~real], torch.zeros(2, 16))
    assert padded.grad[:, real].abs().min() > 0


def test_ranking_of_scores_far_apart_is_exact():
    """At a difference of 25 softplus exceeds it by exp(-25): more than float64 may lose."""
    found = pairwise_ranking(torch.tensor([25.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0]))
    assert found.item() - 25 == pytest.approx(math.exp(-25), rel=1e-3)


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


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "ranking.py"
    spec = importlib.util.spec_from_file_location("ranking", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no procfs to read peak memory from")
def test_benchmark_compares_the_same_loss_and_sees_the_pair_matrix(benchmark):
    cells, per_pair = benchmark.measure(2048, repeats=3, naive_bytes=None)
    row = dict(zip(benchmark.COLUMNS, cells, strict=True))
    assert float(row["gradients differ by"]) < 1e-6
    assert 12 <= per_pair <= 30  # three matrices of float32 at least
    assert float(row["ours, MB"]) < float(row["naive, MB"]) / 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no procfs to read peak memory from")
def test_benchmark_does_not_try_what_does_not_fit(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "available_bytes", lambda: 1_000_000)
    cells, per_pair = benchmark.measure(256, repeats=3, naive_bytes=14.0)
    row = dict(zip(benchmark.COLUMNS, cells, strict=True))
    assert row["naive, ms"] == "not run: needs 0.0 GB of the 0.0 GB that are free"
    assert row["naive / ours"] == row["naive, MB"] == row["gradients differ by"] == ""
    assert float(row["ours, ms"].split()[0]) > 0
    assert per_pair == 14.0
