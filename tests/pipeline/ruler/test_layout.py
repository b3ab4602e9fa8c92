"""Pieces put together: facts at the boundary nearest to their depth, sums of tokens that are met exactly."""

from __future__ import annotations

import pytest

from sdtp.pipeline.ruler.layout import Piece, exactly, plant, size

# Boundaries after 0, 10, 14, 34 and 40 tokens.
TEXT: list[Piece] = [("a", [0] * 10), ("b", [0] * 4), ("c", [0] * 20), ("d", [0] * 6)]


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0.0, "Xabcd"),
        (4 / 40, "Xabcd"),
        (5 / 40, "Xabcd"),  # as near to either: the earlier
        (6 / 40, "aXbcd"),
        (11 / 40, "aXbcd"),
        (13 / 40, "abXcd"),
        (25 / 40, "abcXd"),
        (38 / 40, "abcdX"),
        (1.0, "abcdX"),
    ],
)
def test_a_fact_stands_at_the_nearest_boundary(depth: float, expected: str) -> None:
    assert "".join(text for text, _ in plant(TEXT, [("X", [1])], [depth])) == expected


def test_facts_at_one_boundary_keep_their_order_and_all_tokens_stay() -> None:
    facts: list[Piece] = [("X", [1]), ("Y", [2, 2]), ("Z", [3])]
    planted = plant(TEXT, facts, [0.3, 0.31, 1.0])
    assert "".join(text for text, _ in planted) == "aXbYcdZ" or "".join(text for text, _ in planted) == "abXYcdZ"
    assert size(planted) == 40 + 4
    assert "".join(text for text, _ in plant(TEXT, facts, [0.5, 0.5, 0.5])) == "abXYZcd"


@pytest.mark.parametrize(
    ("tokens", "sizes", "expected"),
    [
        (0, [1, 2], 0),
        (7, [3, 3, 3, 4], 7),
        (5, [3, 3, 4], 4),  # no sum is 5
        (1, [2, 2], 0),
        (11, [6, 5, 9], 11),
        (20, [2, 3], 5),
    ],
)
def test_pieces_add_up_to_the_tokens_or_to_as_few_less_as_can_be(tokens: int, sizes: list[int], expected: int) -> None:
    candidates: list[Piece] = [(str(index), [0] * length) for index, length in enumerate(sizes)]
    chosen = exactly(candidates, tokens)
    assert size(chosen) == expected
    assert len({text for text, _ in chosen}) == len(chosen)
