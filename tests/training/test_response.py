"""The response after its prompt: which logits predict it, and its loss."""

import math

import pytest
import torch

from sdtp.training.response import response_cross_entropy, response_logits


@pytest.mark.parametrize("tokens", [1, 4])
def test_logits_are_those_before_each_response_token(tiny_model, tokens):
    model = tiny_model()
    prompt, response = torch.randint(3, 128, (9,)), torch.randint(3, 128, (tokens,))
    whole = model(torch.cat([prompt, response])[None]).logits[0]
    found = response_logits(model, prompt, response)
    torch.testing.assert_close(found, whole[8 : 8 + tokens], rtol=0, atol=1e-5)


def test_cross_entropy_is_the_mean_over_the_response_in_float32():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.bfloat16)
    expected = (-math.log(1 / (1 + math.exp(logits[0, 1].item()))) + math.log(2)) / 2
    found = response_cross_entropy(logits, torch.tensor([0, 1]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, abs=1e-6)
