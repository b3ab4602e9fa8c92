from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.selection import protected_tokens, select, take


@settings(deadline=None)
@given(st.data())
def test_rows_keep_their_best_tokens_in_order(data):
    rows = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 12))
    lengths = [data.draw(st.integers(1, tokens)) for _ in range(rows)]
    budgets = [data.draw(st.integers(1, n)) for n in lengths]
    # Few distinct values, so that ties at the cut are common.
    scores = torch.tensor([[data.draw(st.integers(0, 3)) for _ in range(tokens)] for _ in range(rows)]).float()
    valid = torch.stack([torch.arange(tokens) >= tokens - n for n in lengths])
    padded = min(lengths) < tokens
    columns, kept = select(scores, torch.zeros_like(valid), valid if padded else None, budgets)
    for row in range(rows):
        real = [c for c in range(tokens) if valid[row, c]]
        best = sorted(sorted(real, key=lambda c: (-scores[row, c].item(), c))[: budgets[row]])
        taken = columns[row] if kept is None else columns[row][kept[row]]
        assert taken.tolist() == best
        if kept is not None:
            assert kept[row].tolist() == [False] * (max(budgets) - budgets[row]) + [True] * budgets[row]


def test_infinite_scores_never_push_out_protected_tokens_or_let_padding_in():
    scores = torch.tensor([[torch.inf, torch.inf, 0.0, -torch.inf, torch.nan]])
    protected = torch.tensor([[False, False, False, True, False]])
    columns, _ = select(scores, protected, None, [2])
    assert columns.tolist() == [[0, 3]]
    valid = torch.tensor([[False, True, True, True, True]])
    columns, _ = select(scores.neg(), torch.zeros_like(protected), valid, [4])
    assert columns.tolist() == [[1, 2, 3, 4]]


def test_sinks_tail_and_marks_are_protected():
    schedule = PruningSchedule((1,), (0.5,), sinks=2, local=0.0, min_local=2)
    positions = torch.tensor([[0, 3, 4, 6, 8, 9], [-1, -1, 0, 1, 2, 3]])
    marked = torch.tensor([[False, False, True, False, False, False], [True, False, False, False, False, False]])
    protected = protected_tokens(schedule, positions, positions >= 0, [6, 4], marked)
    assert protected.tolist() == [[True, False, True, False, True, True], [False, False, True, True, True, True]]


def test_the_tail_of_right_padded_rows_is_their_last_real_tokens():
    schedule = PruningSchedule((1,), (0.5,), sinks=0, local=0.0, min_local=2)
    positions = torch.tensor([[0, 1, 2, 3, -1, -1]])
    protected = protected_tokens(schedule, positions, positions >= 0, [4], None)
    assert protected.tolist() == [[False, False, True, True, False, False]]


def test_take_equals_indexing():
    states = torch.randn(3, 7, 5)
    columns = torch.tensor([[0, 2], [6, 6], [1, 4]])
    expected = torch.stack([states[b, columns[b]] for b in range(3)])
    assert torch.equal(take(states, columns), expected)
    assert torch.equal(take(states[:1], columns), torch.stack([states[0, columns[b]] for b in range(3)]))
    assert torch.equal(take(states[:1], columns[:1]), expected[:1])
