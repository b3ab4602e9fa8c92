"""Received attention and the choice by it, on queries and keys small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sdtp.evaluation.peers import received
from sdtp.evaluation.peers.compression import chosen
from sdtp.evaluation.peers.h2o import H2O
from sdtp.evaluation.peers.received import pooled, received_attention, strongest
from sdtp.evaluation.peers.snapkv import SnapKV


def test_queries_that_tell_no_keys_apart_share_evenly():
    """The third of four tokens gives 1/3 to each of three keys, the last 1/4 to each of four."""
    found = received_attention(torch.zeros(1, 1, 2, 8), torch.randn(1, 4, 8), 1.0)
    torch.testing.assert_close(found, torch.tensor([[7 / 12, 7 / 12, 7 / 12, 1 / 4]]))
    everyone = received_attention(torch.zeros(1, 1, 4, 8), torch.randn(1, 4, 8), 1.0)
    torch.testing.assert_close(everyone, torch.tensor([[25 / 12, 13 / 12, 7 / 12, 1 / 4]]))


def test_query_heads_are_averaged_after_their_softmax():
    """One of two query heads prefers the first of two keys 9 to 1, at a product of 2 x ln 3 and a scaling of 1."""
    keys = torch.tensor([[[1.0], [0.0]]])
    queries = torch.tensor([2 * math.log(3), 0.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(received_attention(queries, keys, 1.0), torch.tensor([[0.7, 0.3]]))
    # Halved, 3 to 1.
    torch.testing.assert_close(received_attention(queries, keys, 0.5), torch.tensor([[0.625, 0.375]]))


def test_blocks_make_no_difference(monkeypatch):
    queries, keys = torch.randn(2, 3, 11, 4), torch.randn(2, 17, 4)
    whole = received_attention(queries, keys, 0.5)
    torch.testing.assert_close(whole.sum(1), torch.tensor([11.0, 11.0]))
    monkeypatch.setattr(received, "_BLOCK", 4)
    torch.testing.assert_close(received_attention(queries, keys, 0.5), whole)


def test_half_precision_is_summed_in_full():
    found = received_attention(torch.randn(1, 1, 3, 4).bfloat16(), torch.randn(1, 5, 4).bfloat16(), 0.5)
    assert found.dtype == torch.float32
    assert found.sum().item() == pytest.approx(3, abs=1e-6)


def test_strongest_keeps_the_latest_and_breaks_ties_to_the_earlier():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0, 9.0, 0.0]])
    assert strongest(scores, 2, 3).tolist() == [[1, 4, 5], [3, 4, 5]]
    assert strongest(scores, 1, 3).tolist() == [[1, 2, 5], [3, 4, 5]]
    assert strongest(scores, 0, 1).tolist() == [[1], [4]]


def test_pooled_averages_over_neighbours_and_zeros_beyond():
    torch.testing.assert_close(pooled(torch.tensor([[3.0, 0.0, 6.0, 9.0]]), 3), torch.tensor([[1.0, 3.0, 5.0, 5.0]]))


class TestSnapKV:
    def test_a_cluster_beats_a_lone_peak(self):
        # Averaged over three: 0 1 1 1 2 3 2 and 0 beside the window, which is not averaged over.
        scores = torch.tensor([[0.0, 0.0, 3.0, 0.0, 3.0, 3.0, 3.0, 0.0, 9.0, 9.0]])
        rule = SnapKV(window=2, kernel=3)
        assert rule.scores(scores, 2).tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 2.0, 1.0, 9.0, 9.0]]
        assert chosen(rule, scores, 3).tolist() == [[5, 8, 9]]

    def test_the_window_is_kept_where_it_fits(self):
        rule = SnapKV(window=8)
        assert rule.queries == 8
        assert [rule.latest(keep) for keep in (1, 2, 7, 8, 9, 100)] == [1, 1, 4, 4, 8, 8]

    @pytest.mark.parametrize(
        ("kwargs", "name"), [({"window": 0}, "window"), ({"kernel": 4}, "kernel"), ({"kernel": -1}, "kernel")]
    )
    def test_refuses(self, kwargs, name):
        with pytest.raises(ValueError, match=f"{name} is {kwargs[name]}"):
            SnapKV(**kwargs)


def test_h2o_keeps_half_for_the_latest():
    scores = torch.tensor([[9.0, 1.0, 8.0, 7.0, 0.0, 0.0, 0.0]])
    assert H2O().queries is None
    assert chosen(H2O(), scores, 4).tolist() == [[0, 2, 5, 6]]
    assert chosen(H2O(), scores, 3).tolist() == [[0, 5, 6]]
    assert chosen(H2O(), scores, 1).tolist() == [[6]]
    assert chosen(H2O(), scores, 7).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
