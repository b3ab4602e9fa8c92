"""The order of the samples: every example once an epoch, those of a batch of like length."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training.examples import Example
from sdtp.training.gradients import _WINDOW, batch_gradient, epoch_order
from sdtp.training.objective import Weights
from sdtp.training.optimizer import flat_gradients
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from tests.training.magnified import magnify


def heavy_tailed(examples):
    """Lengths of which a few are many times the median."""
    chance = random.Random(7)
    return tuple(min(4096, max(8, round(math.exp(chance.gauss(5.5, 1.0))))) for _ in range(examples))


def batches(order_of, examples, batch_size, epochs):
    """Steps of a training: for each the (epoch, example) pairs of its samples."""
    samples = [(epoch, example) for epoch in range(epochs) for example in order_of(epoch)]
    assert len(samples) == epochs * examples
    return [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]


@pytest.mark.parametrize(
    ("examples", "batch_size"), [(1, 1), (1, 8), (5, 8), (7, 3), (50, 1), (64, 8), (1000, 8), (1003, 8)]
)
def test_every_example_comes_once_an_epoch_in_another_order(examples, batch_size):
    lengths = heavy_tailed(examples)
    orders = [epoch_order(0, epoch, lengths, batch_size) for epoch in range(4)]
    assert all(sorted(order) == list(range(examples)) for order in orders)
    if examples >= 50:
        assert len(set(orders)) == 4


def test_the_order_depends_on_seed_epoch_lengths_and_batches_alone():
    lengths = heavy_tailed(50)
    torch.manual_seed(5)
    order = epoch_order(0, 3, lengths, 4)
    epoch_order.cache_clear()
    torch.manual_seed(6)
    assert epoch_order(0, 3, lengths, 4) == order
    for other in ((1, 3, lengths, 4), (0, 2, lengths, 4), (0, 3, lengths[::-1], 4), (0, 3, lengths, 5)):
        assert epoch_order(*other) != order


@pytest.mark.parametrize("examples", [1000, 1003])  # whole batches alone, and batches of two epochs
def test_examples_of_a_batch_are_of_like_length(examples):
    """What a step lasts is its longest example, on as many devices as a batch has."""
    batch_size, epochs = 8, 3
    lengths = heavy_tailed(examples)

    def cost(order_of):
        return sum(
            max(lengths[example] for _, example in batch) for batch in batches(order_of, examples, batch_size, epochs)
        )

    plain = cost(lambda epoch: torch.randperm(examples, generator=torch.Generator().manual_seed(epoch)).tolist())
    sorted_whole = cost(lambda epoch: sorted(range(examples), key=lengths.__getitem__))
    windowed = cost(lambda epoch: epoch_order(0, epoch, lengths, batch_size))
    assert windowed < 0.6 * plain
    assert windowed < 1.3 * sorted_whole


def test_batches_of_a_window_come_in_no_order_of_length():
    batch_size = 4
    lengths = heavy_tailed(_WINDOW * batch_size)
    totals = [
        sum(lengths[example] for _, example in batch)
        for batch in batches(lambda epoch: epoch_order(2, epoch, lengths, batch_size), len(lengths), batch_size, 1)
    ]
    assert len(set(totals)) == _WINDOW
    rising = sum(before < after for before, after in itertools.pairwise(totals))
    assert 3 <= rising <= _WINDOW - 4


@pytest.mark.parametrize(("states", "response"), [(1024, 64), (1, 8), (1 / 512, 1)])
def test_float16_keeps_the_digits_it_has(tiny_model, states, response):
    """Large states have small gradients, most of all of a long response and in a large batch: unscaled they leave
    float16 few digits. Small states have large ones, which overflow as soon as they are scaled."""
    model = magnify(tiny_model(initializer_range=0.02), states)
    torch.manual_seed(3)
    schedule = PruningSchedule((1, 3), (0.7, 0.4), sinks=1, local=0.1, min_local=2)
    scorer = Learned(32, 2, width=8)
    examples = [
        Example(f"e{place}", torch.randint(3, 128, (40,)), torch.randint(3, 128, (response,)), torch.rand(2, 40))
        for place in range(16)
    ]
    gradients = flat_gradients(scorer)

    def run(model):
        batch_gradient(
            gradients, model, MaskingPolicy(schedule, scorer, 0.5), examples, (40 + response,) * 16,
            Weights(ce=1.0, mse=0.0, rank=0.0), step=0, batch_size=16, seed=0, processes=Processes(cpu=True),
        )  # fmt: skip
        return gradients.clone()

    expected = run(model)
    found = run(model.half())
    assert (found - expected).norm() < 0.005 * expected.norm()
