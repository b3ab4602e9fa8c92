"""How much a peer keeps, by hand-counted cases."""

from __future__ import annotations

import pytest

from sdtp.evaluation.peers.budgets import entries_beside, final_survivors, fraction, kept, mean_entries
from sdtp.pruning.schedule import PruningSchedule

# Of 100 tokens 50 are left from layer 2 on and 20 from layer 5 on.
SCHEDULE = PruningSchedule((2, 5), (0.5, 0.2), sinks=1, local=0.0, min_local=2)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (2, 1), (3, 1), (9, 4), (50, 20)])
def test_a_fraction_is_rounded_and_never_nothing(tokens, expected):
    assert kept(fraction(0.4), tokens) == expected


def test_a_half_of_fifty():
    assert kept(fraction(0.5), 50) == 25


def test_kept_is_at_most_all():
    assert kept(lambda tokens: 64, 9) == 9
    assert kept(lambda tokens: 0, 9) == 1
    assert kept(fraction(1.0), 9) == 9


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01])
def test_refuses_fractions_outside(keep):
    with pytest.raises(ValueError, match=rf"keep is {keep}: the fraction to keep must be in \(0, 1\]"):
        fraction(keep)


def test_final_survivors():
    assert final_survivors(SCHEDULE)(100) == 20
    assert final_survivors(SCHEDULE)(5) == 3  # the sink and the tail, where a fifth would be 1
    assert final_survivors(PruningSchedule(()))(100) == 100


def test_mean_entries():
    """Eight layers hold 2 x 100, 3 x 50 and 3 x 20 = 410 tokens: 51.25 each."""
    assert mean_entries(SCHEDULE, 8)(100) == 51
    assert mean_entries(PruningSchedule(()), 8)(100) == 100


@pytest.mark.parametrize(
    ("full_layers", "propagated", "expected"),
    [
        (4, 20, 82),  # 410 - 4 x 20 = 330 in four layers: 82.5, and to the even number
        (4, 30, 72),  # 410 - 4 x 30 = 290: 72.5
        (8, 20, 51),  # no layer after: the mean
        (1, 20, 100),  # 410 - 7 x 20 = 270 in one layer: all it can take
        (4, 103, 2),  # no more than all are handed on: 410 - 4 x 100 = 10 in four
        (2, 90, 1),  # 410 - 6 x 90 < 0: too many are handed on
    ],
)
def test_entries_beside(full_layers, propagated, expected):
    assert entries_beside(SCHEDULE, 8, full_layers, lambda tokens: propagated)(100) == expected


def test_refuses_layers_that_are_not_there():
    with pytest.raises(ValueError, match="the model has layers 0 to 4 only"):
        mean_entries(SCHEDULE, 5)
    with pytest.raises(ValueError, match="the model has layers 0 to 4 only"):
        entries_beside(SCHEDULE, 5, 2, fraction(0.5))
    for full_layers in (0, 9):
        with pytest.raises(ValueError, match=f"full_layers is {full_layers}: 1 to 8 is accepted"):
            entries_beside(SCHEDULE, 8, full_layers, fraction(0.5))
