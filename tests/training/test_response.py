"""The response after its prompt: which logits predict it, and its loss."""

import math

import pytest
import torch

from sdtp.training.response import batch_logits, response_cross_entropy, response_kl, response_logits


@pytest.mark.parametrize("tokens", [1, 4])
def test_logits_are_those_before_each_response_token(tiny_model, tokens):
    model = tiny_model()
    prompt, response = torch.randint(3, 128, (9,)), torch.randint(3, 128, (tokens,))
    whole = model(torch.cat([prompt, response])[None]).logits[0]
    found = response_logits(model, prompt, response)
    torch.testing.assert_close(found, whole[8 : 8 + tokens], rtol=0, atol=1e-5)


def test_logits_of_a_batch_are_those_of_each_row(tiny_model):
    model = tiny_model()
    prompts = [torch.randint(3, 128, (n,)) for n in (9, 4, 12)]
    responses = [torch.randint(3, 128, (n,)) for n in (2, 7, 1)]
    found = batch_logits(model, prompts, responses)
    rows = found.split([len(response) for response in responses])
    for prompt, response, logits in zip(prompts, responses, rows, strict=True):
        whole = model(torch.cat([prompt, response])[None]).logits[0]
        torch.testing.assert_close(logits, whole[len(prompt) - 1 : -1], rtol=0, atol=1e-5)
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_does_not_call_its_head_is_refused(tiny_model):
    model = tiny_model()
    model.get_output_embeddings = lambda: torch.nn.Linear(32, 128)
    with pytest.raises(RuntimeError, match=r"gives logits \(2, 10, 128\) where \(1, 4, vocabulary\) were asked for"):
        batch_logits(model, [torch.arange(3, 12)] * 2, [torch.arange(3, 5)] * 2)


def test_cross_entropy_is_the_mean_over_the_response_in_float32():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.bfloat16)
    expected = (-math.log(1 / (1 + math.exp(logits[0, 1].item()))) + math.log(2)) / 2
    found = response_cross_entropy(logits, torch.tensor([0, 1]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 16, 37])  # a block and less, more than two
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_and_its_gradient_are_those_of_torch_in_float64(tokens, dtype):
    logits = (5 * torch.randn(tokens, 50)).to(dtype).requires_grad_(True)
    reference = (5 * torch.randn(tokens, 50)).to(dtype)
    exact = logits.detach().double().requires_grad_(True)
    expected = torch.nn.functional.kl_div(
        exact.log_softmax(-1), reference.double().log_softmax(-1), reduction="batchmean", log_target=True
    )
    found = response_kl(logits, reference)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    precision = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.item() == pytest.approx(expected.item(), rel=precision)
    (wanted,) = torch.autograd.grad(3 * expected, exact)
    (gradient,) = torch.autograd.grad(3 * found, logits)
    assert gradient.dtype == dtype
    rounding = precision if dtype != torch.bfloat16 else 2**-8  # of the gradient itself, computed wider
    torch.testing.assert_close(gradient.double(), wanted, rtol=rounding, atol=1e-7 if dtype != torch.float64 else 1e-14)


def test_kl_has_the_derivatives_of_finite_differences():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: response_kl(x, reference), logits)
    (response_kl(logits, reference)).backward()
    assert reference.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kl_is_exactly_zero_at_equal_logits(dtype):
    logits = (20 * torch.randn(20, 50)).to(dtype).requires_grad_(True)
    found = response_kl(logits, logits.detach().clone())
    assert found.item() == 0
    found.backward()
    assert not logits.grad.any()


def test_kl_is_blind_to_a_constant_added_to_a_tokens_logits_and_not_symmetric():
    first, second = 3 * torch.randn(4, 9), 3 * torch.randn(4, 9)
    assert response_kl(first + torch.randn(4, 1), second).item() == pytest.approx(
        response_kl(first, second).item(), rel=1e-5
    )
    assert abs(response_kl(first, second) - response_kl(second, first)) > 0.1


def test_kl_holds_a_block_of_positions_in_float32_at_once(monkeypatch):
    """[positions, vocabulary] of both arguments, wherever a softmax is taken: never of the whole response."""
    rows = []
    for name in ("log_softmax", "softmax"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, dim, own=own: rows.append(len(tensor)) or own(tensor, dim)
        )
    logits = torch.randn(40, 9, requires_grad=True)
    response_kl(logits, torch.randn(40, 9)).backward()
    assert rows == [16, 16, 16, 16, 8, 8] * 2


def test_kl_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 9\).*\(3, 9\)"):
        response_kl(torch.zeros(2, 9), torch.zeros(3, 9))
