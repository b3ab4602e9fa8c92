import math

import pytest
import torch

from sdtp.training.optimizer import adamw, flat_gradients


@pytest.mark.parametrize(("updates", "rise"), [(1, 1), (2, 1), (8, 1), (20, 2), (39, 3)])
def test_the_rate_rises_for_a_tenth_of_the_updates_and_falls_to_zero_after_the_last(updates, rise):
    """What each update moves a weight by, under a gradient that is always the same: AdamW's step is the rate then."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    optimizer, rates = adamw(module, 0.5, updates)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    module.weight.grad = torch.ones_like(module.weight)
    found = []
    for _ in range(updates):
        before = module.weight.item()
        optimizer.step()
        rates.step()
        found.append(before - module.weight.item())
    up = [0.5 * (update + 1) / rise for update in range(rise)]
    down = [0.25 * (1 + math.cos(math.pi * k / (updates + 1 - rise))) for k in range(1, updates + 1 - rise)]
    assert found == pytest.approx(up + down, abs=1e-7)
    assert min(found) > 1e-4
    assert rates.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


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
