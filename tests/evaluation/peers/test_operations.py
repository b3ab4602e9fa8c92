"""FLOPs of peers' prefills, counted by hand on the tiny Llama."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from sdtp.evaluation.peers.budgets import fraction
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.fastkv import FastKV
from sdtp.evaluation.peers.gemfilter import GemFilter
from sdtp.evaluation.peers.h2o import H2O
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.pruning import flops, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.conftest import TINY

CONFIG = LlamaConfig(**TINY)
# Four layers of 4 x 8 query channels and 2 x 2 x 8 cached ones on a hidden size of 32, an MLP of 3 x 64 x 32.
WEIGHTS = 32 * 32 + 32 * 32 + 32 * 32 + 3 * 64 * 32
QUERY = 32
HEAD = 2 * 32 * 128


def layers(tokens):
    """A layer's prefill of so many tokens: products with weights, and scores and values of a causal triangle."""
    return 2 * tokens * WEIGHTS + 4 * QUERY * tokens * (tokens + 1) // 2


def test_gemfilter_counts_both_passes():
    """Three layers and one last query on 40 tokens, four layers and the head on 12."""
    expected = 3 * layers(40) + 2 * QUERY * 40 + 4 * layers(12) + HEAD
    assert GemFilter(2, fraction(0.3)).prefill_flops(CONFIG, 40) == expected


def test_h2o_counts_all_scores_again():
    expected = 4 * (layers(40) + 2 * QUERY * 820) + HEAD
    assert Compression(H2O(), fraction(0.4)).prefill_flops(CONFIG, 40) == expected
    assert expected > flops.prefill(CONFIG, 40)


def test_snapkv_counts_the_windows():
    """The last six of 40 queries see 35 + ... + 40 = 225 keys."""
    expected = 4 * (layers(40) + 2 * QUERY * 225) + HEAD
    assert Compression(SnapKV(6, 3), fraction(0.4)).prefill_flops(CONFIG, 40) == expected
    # A window longer than the prompt: all 10 queries see 55 keys.
    assert Compression(SnapKV(), fraction(0.4)).prefill_flops(CONFIG, 10) == 4 * (layers(10) + 2 * QUERY * 55) + HEAD


def test_on_top_of_pruning_counts_what_is_left():
    """40, 24, 24 and 12 tokens; six queries see 225, 129, 129 and 57 keys."""
    schedule = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
    scores = 2 * QUERY * (225 + 129 + 129 + 57)
    expected = layers(40) + 2 * layers(24) + layers(12) + HEAD + scores
    random = Compression(SnapKV(6, 3), fraction(0.4), TokenPruner(schedule, scorers.Random(0)))
    assert random.prefill_flops(CONFIG, 40) == expected
    learned = scorers.Learned(32, 2, width=4)
    scoring = flops.scoring(40, schedule, learned)
    assert scoring > 0
    peer = Compression(SnapKV(6, 3), fraction(0.4), TokenPruner(schedule, learned))
    assert peer.prefill_flops(CONFIG, 40) == expected + scoring


@pytest.mark.parametrize(("layer", "full"), [(0, 1), (2, 3)])
def test_fastkv_counts_what_goes_on(layer, full):
    """Layers up to the chosen one on 40 tokens, the others on 18, whose last six queries see 93 keys."""
    expected = full * (layers(40) + 2 * QUERY * 225) + (4 - full) * (layers(18) + 2 * QUERY * 93) + HEAD
    assert FastKV(layer, fraction(0.45), fraction(0.1), SnapKV(6, 3)).prefill_flops(CONFIG, 40) == expected
