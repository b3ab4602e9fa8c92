import math

import pytest
import torch

from sdtp.training.optimizer import adamw, flat_gradients


@pytest.mark.parametrize(("updates", "warmup"), [(1, 1), (5, 1), (20, 2), (39, 3)])
def test_the_rate_rises_for_a_tenth_of_the_updates_and_falls_to_zero(updates, warmup):
    optimizer, rates = adamw(torch.nn.Linear(2, 2), 0.5, updates)
    found = []
    for _ in range(updates):
        optimizer.step()
        rates.step()
        found.append(rates.get_last_lr()[0])
    rise = [0.5 * (step + 1) / warmup for step in range(warmup)]
    fall = [0.25 * (1 + math.cos(math.pi * (step + 1) / (updates - warmup))) for step in range(updates - warmup)]
    assert found == pytest.approx(rise + fall, abs=1e-9)
    assert (found[-1] == pytest.approx(0.0, abs=1e-9)) == (updates > 1)


def test_a_backward_pass_adds_to_the_flat_gradients_and_an_update_reads_them():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    inputs = torch.randn(5, 3)
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(module(inputs).sum(), module.parameters())])
    flat = flat_gradients(module)
    assert flat.shape == (3 * 2 + 2 + 2 + 1,)
    assert not flat.any()
    for _ in range(2):
        module(inputs).sum().backward()
    torch.testing.assert_close(flat, 2 * expected)
    before = [weight.detach().clone() for weight in module.parameters()]
    flat.fill_(1.0)
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    for weight, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(weight, old - 0.5)
    flat.zero_()
    assert not any(weight.grad.any() for weight in module.parameters())
