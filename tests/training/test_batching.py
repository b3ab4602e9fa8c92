"""Batches by length: every example once, within the limits, the same every time."""

import random

import pytest

from sdtp.training.batching import demanding_first, length_batches


def test_batches_are_filled_longest_first():
    # 4 x 10 tokens fit into 40; the 9 does too where a tenth may be padding (39 of 40 are real).
    assert length_batches([3, 10, 9, 10, 10, 3], 40) == [(1, 3, 4, 2), (0, 5)]
    assert length_batches([3, 10, 9, 10, 10, 3], 39) == [(1, 3, 4), (2,), (0, 5)]


def test_padding_ends_a_batch():
    assert length_batches([10, 9, 8], 1000) == [(0, 1, 2)]  # 3 of 30 are padding
    assert length_batches([10, 9, 7], 1000) == [(0, 1), (2,)]  # 4 of 30
    assert length_batches([10, 9, 9, 10], 1000, most_padding=0.0) == [(0, 3), (1, 2)]


def test_an_example_over_the_limit_runs_alone():
    assert length_batches([50, 50, 5], 20) == [(0,), (1,), (2,)]
    assert length_batches([], 20) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_batch_within_the_limits(seed):
    chance = random.Random(seed)
    lengths = [chance.randint(1, 400) for _ in range(200)]
    batches = length_batches(lengths, 1000)
    assert sorted(place for batch in batches for place in batch) == list(range(200))
    for batch in batches:
        tokens = len(batch) * max(lengths[place] for place in batch)
        assert tokens <= 1000
        assert tokens - sum(lengths[place] for place in batch) <= 0.1 * tokens
    assert len(batches) < 80  # 0.4 of the examples: two or three a batch at these lengths
    longest = [lengths[batch[0]] for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_that_may_need_most_memory_come_first():
    lengths = [6, 6, 5, 20, 7, 8]
    batches = [(3,), (5, 4, 0), (1, 2)]
    # 20, 24 and 12 tokens with padding; 20, 8 and 6 in the longest; 1, 3 and 9 of responses, counted over the batch.
    assert demanding_first(batches, lengths, [1, 4, 5, 1, 1, 1]) == [(5, 4, 0), (3,), (1, 2)]
    batches = [(3,), (5,), (4,), (0,), (1, 2)]
    assert demanding_first(batches, lengths, [6, 4, 5, 1, 1, 1]) == [(3,), (1, 2), (5,), (4,), (0,)]
    assert demanding_first(batches, lengths, [10, 4, 5, 1, 1, 1]) == [(3,), (0,), (5,), (4,), (1, 2)]


def test_batches_of_which_the_first_needs_most_of_all_stay_in_order():
    lengths, batches = [6, 5, 5, 20, 5], [(3,), (0, 2), (4, 1)]
    assert demanding_first(batches, lengths, [1, 1, 1, 9, 1]) == batches
    assert demanding_first(batches, lengths, [1, 1, 1, 2, 1]) == batches  # as many in each: the first of them
    assert demanding_first([], [], []) == []
