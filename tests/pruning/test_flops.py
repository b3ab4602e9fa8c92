from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import MixtralConfig

from sdtp.pruning import flops
from sdtp.pruning.schedule import PruningSchedule

TINY = SimpleNamespace(
    num_hidden_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
    vocab_size=10,
)
QWEN2_7B = SimpleNamespace(
    num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
    vocab_size=0,
)  # fmt: skip
SMOLLM2 = SimpleNamespace(
    num_hidden_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=0,
)


def test_prefill_by_hand():
    # Per token and layer: q 8x8, k and v 8x4 each, o 8x8, three MLP matrices 8x16; a multiply-add counts two.
    weights = 2 * (64 + 32 + 32 + 64 + 3 * 128)
    # Causal pairs of three tokens: 1 + 2 + 3; scores and values over two heads of four.
    attention = 6 * (2 * 2 * 8)
    assert flops.prefill(TINY, 3) == 2 * (3 * weights + attention) + 2 * 8 * 10


def test_a_pruned_layer_counts_its_survivors():
    schedule = PruningSchedule((1,), (0.5,), sinks=0, local=0.0, min_local=1)
    weights, pair = 2 * (64 + 32 + 32 + 64 + 3 * 128), 32
    expected = (4 * weights + 10 * pair) + (2 * weights + 3 * pair) + 160
    assert flops.prefill(TINY, 4, schedule) == expected
    # The scorer sees the four tokens entering its stage: 8 -> 5 -> 2.
    assert flops.scoring(TINY, 4, schedule, 5) == 4 * 2 * (8 * 5 + 5 * 2)
    assert flops.prefill(TINY, 4, schedule, scorer_width=5) == expected + 400


def test_decode_by_hand():
    weights, pair = 2 * (64 + 32 + 32 + 64 + 3 * 128), 32
    # Two steps after the first token: contexts of 4 and 5 tokens.
    assert flops.decode(TINY, 3, 3) == 2 * (2 * weights + (4 + 5) * pair) + 2 * 160
    assert flops.decode(TINY, 3, 1) == 0


def test_cache_bytes_by_hand():
    schedule = PruningSchedule((1,), (0.5,), sinks=0, local=0.0, min_local=1)
    assert flops.cache_bytes(TINY, 4) == 2 * 4 * 2 * 4 * 4
    assert flops.cache_bytes(TINY, 4, schedule, bytes_per_value=2) == (4 + 2) * 2 * 4 * 2


@pytest.mark.parametrize(
    ("config", "ratio", "tokens", "bound"),
    [
        (QWEN2_7B, 0.9, 1024, 1.45),
        (QWEN2_7B, 0.9, 32768, 1.58),
        (QWEN2_7B, 0.8, 8192, 2.08),
        (QWEN2_7B, 0.7, 131072, 3.45),
        (SMOLLM2, 0.9, 4096, 1.67),
        (SMOLLM2, 0.8, 2048, 2.31),
        (SMOLLM2, 0.7, 512, 2.89),
    ],
)
def test_bounds_of_the_reference_models(config, ratio, tokens, bound):
    schedule = PruningSchedule.geometric(num_layers=config.num_hidden_layers, start=4, step=3, ratio=ratio)
    assert flops.prefill(config, tokens) / flops.prefill(config, tokens, schedule) == pytest.approx(bound, abs=0.02)


def test_a_mixture_of_experts_is_not_counted_as_dense():
    with pytest.raises(ValueError, match="mixture of experts"):
        flops.prefill(MixtralConfig(num_local_experts=8), 1024)
