"""Attention under a key mask: values of removal, gradients of its formula, and slopes of bringing hidden keys back."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdtp.training.attention import AdditiveMasks, masked_key_attention, masked_softmax


def seen_by(mask, window):
    """[batch, 1, tokens, tokens]: what each query weighs each key by."""
    tokens = mask.shape[-1]
    itself = torch.eye(tokens, dtype=torch.bool)
    weights = torch.where(itself, 1.0, mask.expand(-1, 1, tokens, tokens)).tril()
    return weights if window is None else weights.triu(1 - window)


def explicit(scores, mask, window=None, sink=None):
    """The probabilities of the formula, as autograd sees them."""
    shift = scores.detach().amax(-1, keepdim=True)
    weights = seen_by(mask, window) * (scores - shift).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / (total if sink is None else total + (sink[:, None, None] - shift).exp())


def random_inputs():
    query, key, value = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = (torch.rand(2, 1, 1, 7) > 0.5).double().requires_grad_(True)
    assert 2 < mask.sum() < 12
    return query, key, value, mask


def check_mask_gradient(gradient, wanted, mask, slope_of, window):
    """`wanted` at visible keys, at hidden ones the change of the loss when the key comes back to one row at a time."""
    visible = mask.detach() > 0
    torch.testing.assert_close(gradient[visible], wanted[visible], rtol=0, atol=1e-12)
    hidden = (~visible).nonzero().tolist()
    assert len(hidden) > 4
    for batch, _, _, column in hidden:
        last = 7 if window is None else min(7, column + window)
        slopes = torch.stack([slope_of(batch, row, column) for row in range(column, last)])[1:]
        assert gradient[batch, 0, 0, column].item() == pytest.approx(slopes.sum().item(), abs=1e-12)


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_has_the_gradients_of_its_formula_and_the_slope_of_bringing_a_hidden_key_back(
    monkeypatch, block, window
):
    monkeypatch.setattr("sdtp.training.attention._BLOCK", block)
    inputs = query, key, value, mask = random_inputs()
    upstream = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    scores = query @ key.mT * 0.5
    expected = explicit(scores, mask, window) @ value
    found = masked_key_attention(*inputs, 0.5, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    *wanted, wanted_mask = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
    *gradients, mask_gradient = torch.autograd.grad(found, inputs, upstream)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    def slope_of(batch, row, column):
        back = mask.detach().clone()
        back[batch, 0, 0, column] = 1
        change = (explicit(scores, back, window) @ value - expected)[batch, :, row]
        return (change * upstream[batch, :, row]).sum()

    check_mask_gradient(mask_gradient, wanted_mask, mask, slope_of, window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sink", [False, True])
def test_softmax_has_the_gradients_of_its_formula_and_the_same_slopes(window, with_sink):
    *_, mask = random_inputs()
    scores = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(3, dtype=torch.float64) if with_sink else None
    upstream = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    expected = explicit(scores, mask, window, sink)
    found = masked_softmax(scores, mask, window, sink)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if with_sink:
        assert (found.sum(-1) < 0.99).any()
    wanted, wanted_mask = torch.autograd.grad(expected, (scores, mask), upstream, retain_graph=True)
    gradient, mask_gradient = torch.autograd.grad(found, (scores, mask), upstream)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)

    def slope_of(batch, row, column):
        back = mask.detach().clone()
        back[batch, 0, 0, column] = 1
        change = (explicit(scores, back, window, sink) - expected)[batch, :, row]
        return (change * upstream[batch, :, row]).sum()

    check_mask_gradient(mask_gradient, wanted_mask, mask, slope_of, window)


@pytest.mark.parametrize("excluded", [-torch.inf, torch.finfo(torch.float64).min])
def test_keys_that_scores_exclude_stay_excluded_and_give_no_gradient(excluded):
    *_, mask = random_inputs()
    scores = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    scores[..., 2:, 0] = excluded  # seen by itself and the second token alone
    found = masked_softmax(scores.requires_grad_(True), mask)
    assert not found[..., 2:, 0].any()
    gradient, mask_gradient = torch.autograd.grad(found, (scores, mask), torch.randn_like(found))
    assert gradient.isfinite().all()
    assert not gradient[..., 2:, 0].any()
    visible_to_one = explicit(scores[..., :2, :2], mask[..., :2])
    assert torch.allclose(found[..., :2, :2], visible_to_one)
    assert mask_gradient[..., 0].abs().min() > 0


def test_rows_without_gradient_cost_nothing_and_change_nothing(monkeypatch):
    """As those of removed tokens: their part of the matrix is never formed."""
    inputs = random_inputs()
    upstream = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    upstream[:, :, [0, 3, 4]] = 0
    expected = torch.autograd.grad(
        explicit(inputs[0] @ inputs[1].mT * 0.5, inputs[3]) @ inputs[2], inputs[:3], upstream
    )
    shapes = []
    rows_of = torch.Tensor.index_select

    def index_select(tensor, dim, index):
        shapes.append(len(index))
        return rows_of(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", index_select)
    found = torch.autograd.grad(masked_key_attention(*inputs, 0.5), inputs, upstream)
    assert shapes == [4, 4]
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_is_passed_on():
    inputs = random_inputs()
    upstream = torch.zeros(2, 3, 7, 4, dtype=torch.float64)
    upstream[0, 0, 5, 1] = torch.nan
    gradients = torch.autograd.grad(masked_key_attention(*inputs, 0.5), inputs, upstream)
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [30.0, 300.0])
def test_a_hidden_key_that_attention_wants_has_a_bounded_gradient(dtype, wanted):
    # The third query's scores are 0, 150 or 1500, and 25: e to the difference is beyond float32, or any float.
    query, key = (torch.tensor([[[[0.0], [wanted], [5.0]]]], dtype=dtype, requires_grad=True) for _ in range(2))
    value = torch.tensor([[[[0.0], [1.0], [0.0]]]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([[[[1.0, 0, 1]]]], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    masked_key_attention(query, key, value, mask, 1.0)[0, 0, 2].sum().backward()
    # The third query would give the second key all its weight: the result would go from 0 to 1, and no further.
    assert mask.grad is not None
    assert mask.grad[0, 0, 0, 1].item() == pytest.approx(1.0, abs=1e-12)
    # It does not see that key as things are, and what it sees has value 0.
    assert torch.equal(mask.grad[0, 0].float(), torch.tensor([[0.0, 1, 0]]))
    assert value.grad[0, 0, :, 0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    for tensor in (query, key):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_half_precision_are_those_of_the_scores_that_the_forward_pass_takes(dtype, tolerance, autocast):
    """Keys and queries with biases, so that scores are 30 to 60; rounded, they would be off by three times as much."""
    tokens, width, scaling = 96, 64, 0.125
    torch.manual_seed(0)
    bias = torch.randn(4, 1, width)
    bias = 60 * bias / bias.norm(dim=-1, keepdim=True)
    query = (0.5 * torch.randn(1, 4, tokens, width) + 0.1 * bias).to(dtype)
    key, value = (torch.randn(1, 4, tokens, width) + bias).to(dtype), (torch.randn(1, 4, tokens, width) + 3).to(dtype)
    mask = (torch.rand(1, 1, 1, tokens) > 0.5).float()
    upstream = torch.randn(1, 4, tokens, width).to(dtype)
    scores = (query.double() @ key.double().mT * scaling).tril()
    assert 30 < scores[scores != 0].quantile(0.05) < scores[scores != 0].quantile(0.95) < 60

    def gradients(dtype):
        inputs = [tensor.to(dtype).requires_grad_(True) for tensor in (query, key, value)]
        inputs.append(mask.to(torch.promote_types(dtype, torch.float32)).requires_grad_(True))
        with torch.autocast("cpu", dtype) if autocast and dtype != torch.float64 else contextlib.nullcontext():
            return torch.autograd.grad(masked_key_attention(*inputs, scaling), inputs, upstream.to(dtype))

    for found, exact in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert ((found.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [3, 256])
def test_an_additive_mask_says_what_each_query_sees_in_rows_that_kernels_take_as_they_are(
    monkeypatch, dtype, window, block
):
    monkeypatch.setattr("sdtp.training.attention._BLOCK", block)
    *_, mask = random_inputs()
    added = AdditiveMasks().of(mask, window, dtype)
    assert torch.equal(added, seen_by(mask.detach(), window).log().to(dtype))
    assert all(stride % 8 == 0 for stride in added.stride()[:-1])


def test_calls_with_one_key_mask_make_one_matrix_together():
    query, key, value = torch.randn(3, 1, 2, 300, 4).unbind(0)
    mask = (torch.rand(1, 1, 1, 300) > 0.5).float().requires_grad_(True)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            before = {tensor.data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= 300**2 and tensor.data_ptr() not in before:
                    made.append(tensor)
            return out

    masks = AdditiveMasks()
    with Watch():
        for _ in range(3):
            masked_key_attention(query, key, value, mask, 0.5, None, masks)
    assert [one.dtype for one in made] == [torch.float32]
    other = masks.of(mask.detach().clone(), None, torch.float32)
    assert other.data_ptr() != made[0].data_ptr()
