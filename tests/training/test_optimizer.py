import math

import pytest
import torch

from sdtp.training.optimizer import adamw


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
