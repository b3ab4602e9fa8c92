"""The numbers of the two observations, against small cases counted by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtp.errors import UserError
from sdtp.pipeline.observations import foresight_table, rank_correlations, salient_share, sparsity_table, telling
from tests.pipeline.rows import only


@pytest.mark.parametrize(
    ("scores", "mass", "expected"),
    [
        # 5 + 3 = 8 is exactly 80% of 10; one thing more is needed for anything above.
        ([[1, 5, 1, 3]], 0.8, [2 / 4]),
        ([[1, 5, 1, 3]], 0.81, [3 / 4]),
        ([[1, 5, 1, 3]], 0.5, [1 / 4]),
        ([[1, 5, 1, 3]], 1.0, [4 / 4]),
        # Magnitudes count: the signed sum of the first stage would be zero.
        ([[4, -4, 0, 0], [1, 1, 1, 1]], 0.9, [2 / 4, 4 / 4]),
        # 0.9 * 10 is met exactly by nine equal tokens, in floating point as well.
        ([[0.1] * 10], 0.9, [9 / 10]),
    ],
)
def test_salient_share_is_the_fewest_tokens_that_carry_the_mass(scores: Any, mass: Any, expected: Any) -> None:
    np.testing.assert_allclose(salient_share(np.array(scores, dtype=float), mass), expected)


@pytest.mark.parametrize("stage", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_salient_share_refuses_what_has_no_share(stage: Any) -> None:
    with pytest.raises(UserError, match="zero or is not finite"):
        salient_share(np.array([[1.0, 2.0], stage]), 0.5)


def test_rank_correlations_are_spearmans_of_magnitudes() -> None:
    # Ranks 1 2 3 4, the same of magnitudes, and 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6.
    scores = np.array([[0.1, 0.2, 0.3, 9.0], [-1.0, 2.0, -30.0, 40.0], [2.0, 1.0, 4.0, 3.0]])
    expected = [[1, 1, 0.6], [1, 1, 0.6], [0.6, 0.6, 1]]
    np.testing.assert_allclose(rank_correlations(scores), expected)
    # Two tokens that tie share their rank: 1.5 1.5 3 against 1 2 3 correlates by sqrt(3) / 2.
    tied = rank_correlations(np.array([[5.0, 5.0, 7.0], [1.0, 2.0, 3.0]]))
    assert tied[0, 1] == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize("stage", [[1.0, -1.0], [np.nan, 1.0]])
def test_rank_correlations_refuse_what_has_no_order(stage: Any) -> None:
    with pytest.raises(UserError, match="two that differ"):
        rank_correlations(np.array([[1.0, 2.0], stage]))


def test_examples_without_a_difference_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """What training accepts must not end the figures, which come after hours: a prompt of one token, a response that
    depends on no token."""
    kept = np.array([[1.0, -2.0], [3.0, 0.0]])
    scores = {"one": np.array([[1.0], [2.0]]), "kept": kept, "even": np.array([[1.0, 2.0], [5.0, -5.0]])}
    found = telling(scores, Path("index.json"))
    assert found == {"kept": kept}
    sparsity_table([*found.values()], [1, 2])
    foresight_table([*found.values()], [1, 2])
    assert "index.json: 2 of 3 examples are in no figure" in caplog.text
    assert "the first is 'one'" in caplog.text
    with pytest.raises(UserError, match=r"index\.json: in no example"):
        telling({"one": scores["one"]}, Path("index.json"))
    caplog.clear()
    telling({"kept": kept}, Path("index.json"))
    assert not caplog.text


# Of the first layer 90% of the mass in 1, 2, 3 and 4 tokens of four; of the second always in one.
SPARSE = [
    np.array([row, [97, 1, 1, 1]], dtype=float) for row in ([97, 1, 1, 1], [48, 48, 2, 2], [33, 33, 33, 1], [1] * 4)
]


def test_sparsity_table_has_a_row_a_layer_and_mass_with_interval_and_quartiles() -> None:
    table = sparsity_table(SPARSE, [4, 7])
    assert list(zip(table["layer"], table["mass"], strict=True)) == [
        (layer, mass) for layer in (4, 7) for mass in (0.9, 0.8, 0.5)
    ]
    row = only(table, layer=4, mass=0.9)
    assert (row["share"], row["q25"], row["q75"], row["n"]) == pytest.approx((0.625, 0.4375, 0.8125, 4))
    # Of 0.25, 0.5, 0.75 and 1: variance 0.3125 / 3, and 3.182446 of Student's distribution with 3 degrees of freedom.
    half = 3.182446 * math.sqrt(0.3125 / 3 / 4)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.625 - half, 0.625 + half))
    assert only(table, layer=4, mass=0.5)["share"] == pytest.approx((0.25 + 0.5 + 0.5 + 0.5) / 4)
    assert set(table.loc[table["layer"] == 7, "share"]) == {0.25}


def test_foresight_table_has_a_row_for_each_layer_and_each_later_one() -> None:
    rising, falling = [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]
    examples = [np.array([rising, rising, falling]), *[np.array([rising, falling, falling])] * 3]
    table = foresight_table(examples, [4, 7, 10])
    assert list(zip(table["layer"], table["later_layer"], strict=True)) == [(4, 7), (4, 10), (7, 10)]
    assert list(table["correlation"]) == pytest.approx([-0.5, -1.0, 0.5])
    row = only(table, layer=7, later_layer=10)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.5 - 3.182446 / 2, 0.5 + 3.182446 / 2))
    one = only(foresight_table(examples[:1], [4, 7, 10]), layer=4, later_layer=7)
    assert (one["correlation"], one["n"]) == (1, 1)
    assert math.isnan(one["ci_low"])  # one example says nothing of the spread
    assert (row["q25"], row["q75"], row["n"]) == pytest.approx((0.5, 1.0, 4))
