from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AriaTextConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    Gemma3Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from sdtp import TokenPruner, scorers
from sdtp.pruning import flops
from sdtp.pruning.schedule import PruningSchedule
from tests.conftest import FAMILIES, TINY, WINDOW

SMALL = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
    vocab_size=10,
)
# Of one word, so that the decoder layers alone are compared.
QWEN2_7B = Qwen2Config(
    num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
    vocab_size=1,
)  # fmt: skip
SMOLLM2 = LlamaConfig(
    num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=1,
)  # fmt: skip


def test_counting_leaves_the_config_and_the_random_state_as_they_are():
    config = Qwen2Config(**TINY, attn_implementation="flash_attention_2", dtype="bfloat16")
    before, state = config.to_dict(), torch.get_rng_state()
    flops.prefill(config, 16)
    assert (config.to_dict(), config._attn_implementation) == (before, "flash_attention_2")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_prefill_by_hand():
    # Per token and layer: q 8x8, k and v 8x4 each, o 8x8, three MLP matrices 8x16; a multiply-add counts two.
    weights = 2 * (64 + 32 + 32 + 64 + 3 * 128)
    # Causal pairs of three tokens: 1 + 2 + 3; scores and values over two heads of four.
    attention = 6 * (2 * 2 * 8)
    assert flops.prefill(SMALL, 3) == 2 * (3 * weights + attention) + 2 * 8 * 10


def test_a_pruned_layer_counts_its_survivors():
    schedule = PruningSchedule((1,), (0.5,), sinks=0, local=0.0, min_local=1)
    weights, pair = 2 * (64 + 32 + 32 + 64 + 3 * 128), 32
    expected = (4 * weights + 10 * pair) + (2 * weights + 3 * pair) + 160
    assert flops.prefill(SMALL, 4, schedule) == expected
    # The scorer sees the four tokens entering its stage: 8 -> 5 -> 2.
    scorer = scorers.Learned(8, 1, width=5)
    assert flops.scoring(4, schedule, scorer) == 4 * 2 * (8 * 5 + 5 * 2)
    assert flops.prefill(SMALL, 4, schedule, scorer) == expected + 400
    # A stage that has nothing to remove does not score.
    idle = PruningSchedule((1, 2, 3), (0.5, 0.5, 0.25), sinks=0, local=0.0, min_local=1)
    assert flops.scoring(4, idle, scorers.Learned(8, 3, width=5)) == (4 + 2) * 2 * (8 * 5 + 5 * 2)
    # Three numbers for the place and two heads; keys and queries 8 -> 16, of at most the last 16 tokens.
    asking = scorers.Learned(8, 1, width=5, position=True, question_rank=16)
    assert flops.scoring(4, schedule, asking) == 2 * (4 * ((8 + 3 + 2) * 5 + 5 * 2) + 16 * (8 * 8 + 4 * 4))
    assert flops.scoring(20, schedule, asking) == 2 * (20 * ((8 + 3 + 2) * 5 + 5 * 2) + 16 * (36 * 8 + 20 * 16))
    # Two neighbours on each side, the token itself and recency: six more a token.
    deciding = scorers.Learned(8, 1, width=5, neighbours=2, recency=0.25)
    assert flops.scoring(4, schedule, deciding) == 4 * 2 * (8 * 5 + 5 * 2 + 6)


def test_decode_by_hand():
    weights, pair = 2 * (64 + 32 + 32 + 64 + 3 * 128), 32
    # Two steps after the first token: contexts of 4 and 5 tokens.
    assert flops.decode(SMALL, 3, 3) == 2 * (2 * weights + (4 + 5) * pair) + 2 * 160
    assert flops.decode(SMALL, 3, 1) == 0


def test_cache_bytes_by_hand():
    schedule = PruningSchedule((1,), (0.5,), sinks=0, local=0.0, min_local=1)
    assert flops.cache_bytes(SMALL, 4) == 2 * 4 * 2 * 4 * 4
    assert flops.cache_bytes(SMALL, 4, schedule, bytes_per_value=2) == (4 + 2) * 2 * 4 * 2


def test_a_sliding_window_by_hand():
    window = MistralConfig(**{**SMALL.to_dict(), "sliding_window": 4})
    schedule = PruningSchedule((1,), (0.6,), sinks=0, local=0.0, min_local=1)
    weights, pair, head = 2 * (64 + 32 + 32 + 64 + 3 * 128), 32, 160
    # Ten queries see 1, 2, 3, 4, 4, 4, 4, 4, 4, 4 keys, six survivors at most 1, 2, 3, 4, 4, 4; three fit in unfilled.
    assert flops.prefill(window, 10) == 2 * (10 * weights + 34 * pair) + head
    assert flops.prefill(window, 10, schedule) == (10 * weights + 34 * pair) + (6 * weights + 18 * pair) + head
    assert flops.prefill(window, 3) == 2 * (3 * weights + 6 * pair) + head
    # After two tokens a step sees 3, then 4, then 4 again.
    assert flops.decode(window, 2, 4) == 3 * 2 * weights + 2 * (3 + 4 + 4) * pair + 3 * head
    # The fourth key that a next token sees is its own: three of 2 x 4 values are held, in either layer.
    assert flops.cache_bytes(window, 10) == flops.cache_bytes(window, 10, schedule) == 2 * 3 * 8 * 4
    assert flops.cache_bytes(window, 2) == 2 * 2 * 8 * 4


def test_experts_by_hand():
    config = MixtralConfig(**{**SMALL.to_dict(), "num_local_experts": 4, "num_experts_per_tok": 3})
    attention, expert, router = 64 + 32 + 32 + 64, 3 * 128, 4 * 8
    assert flops.prefill(config, 1) == 2 * (2 * (attention + 3 * expert + router) + 32) + 160


@dataclasses.dataclass
class Sizes:
    """What the counter cannot tell: it counts squares of attention, and here is what they are squares of."""

    query: int  # query heads x head dimension
    windows: list[int | None]


FULL = Sizes(32, [None] * 4)
SLIDING = Sizes(32, [WINDOW] * 4)
# Family -> changes to its tiny configuration, sizes. Wide heads: 4 x 12 is not the hidden size of 32.
COUNTED: dict[str, tuple[dict[str, Any], Sizes]] = {
    "llama": ({}, FULL),
    "qwen2": ({}, FULL),
    "qwen3": ({"head_dim": 12}, Sizes(48, [None] * 4)),
    "mistral": ({}, FULL),
    "mistral_window": ({}, SLIDING),
    "gemma3": ({"head_dim": 12}, Sizes(48, [WINDOW, None] * 3)),
    "phi3": ({}, FULL),
    "phi3_window": ({}, SLIDING),
    "gpt_neox": ({"intermediate_size": 80, "num_key_value_heads": None}, FULL),
    "opt": ({"ffn_dim": 80, "num_key_value_heads": None}, FULL),
    "bloom": ({"num_key_value_heads": None}, FULL),
    "mixtral": ({"num_experts_per_tok": 3}, FULL),
    "qwen3_moe": ({"head_dim": 12, "mlp_only_layers": [1]}, Sizes(48, [None] * 4)),
    "gpt_oss": ({}, Sizes(32, [None, WINDOW] * 2)),
    "smollm3": ({}, FULL),
    "olmo2": ({}, FULL),
    # A shared expert with its gate beside the routed ones, dense layers 0 and 2 between the sparse ones.
    "qwen2_moe": (
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "experts_implementation": "eager",
        },
        FULL,
    ),
}


@pytest.fixture
def counted_model(tiny_model, monkeypatch):
    """Factory of the tiny model of a row above, with eager attention: every product is one that the counter sees."""
    monkeypatch.setitem(FAMILIES, "qwen2_moe", (Qwen2MoeConfig, Qwen2MoeForCausalLM, {}))
    return lambda family: tiny_model(family, attention="eager", **COUNTED[family][0])


def operations(model, **inputs):
    """What ran, measured: the products of one forward, without those that turn positions into rotary angles."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(**inputs)
    modules = counter.get_flop_counts()
    angles = sum(sum(products.values()) for name, products in modules.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles, output


def triangles_for_squares(sizes, lengths):
    """What to add to a counted prefill, whose attention is `n x n` in every layer, to have the pairs that count."""
    difference = 0
    for window, n in zip(sizes.windows, lengths, strict=True):
        pairs = sum(min(i + 1, window or n) for i in range(n))
        difference += 4 * sizes.query * (pairs - n * n)
    return difference


def test_every_family_of_the_other_tests_is_counted():
    assert set(FAMILIES) <= set(COUNTED)


@pytest.mark.parametrize("tokens", [7, 20])
@pytest.mark.parametrize("family", COUNTED)
def test_prefill_is_what_runs(counted_model, family, tokens):
    model, sizes = counted_model(family), COUNTED[family][1]
    ran, _ = operations(model, input_ids=torch.randint(3, 128, (1, tokens)), logits_to_keep=1)
    expected = ran + triangles_for_squares(sizes, [tokens] * len(sizes.windows))
    assert flops.prefill(model.config, tokens) == expected


@pytest.mark.parametrize("tokens", [7, 11, 20])
@pytest.mark.parametrize("family", COUNTED)
def test_decode_and_cache_are_what_runs(counted_model, family, tokens):
    model = counted_model(family)
    _, output = operations(model, input_ids=torch.randint(3, 128, (1, tokens)))
    cache = output.cache
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert flops.cache_bytes(model.config, tokens) == held
    steps = [operations(model, input_ids=torch.tensor([[5 + i]]), cache=cache)[0] for i in range(3)]
    assert flops.decode(model.config, tokens, 4) == sum(steps)


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral", "gemma3"])
def test_a_pruned_prefill_is_what_runs(counted_model, family):
    model, sizes = counted_model(family), COUNTED[family][1]
    schedule = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
    scorer = scorers.Learned(32, 2, width=8, position=True, question_rank=8)
    pruner = TokenPruner(schedule, scorer)
    with pruner(model):
        ran, _ = operations(model, input_ids=torch.randint(3, 128, (1, 40)), logits_to_keep=1)
    lengths = [40, 24, 24, 12, 12, 12][: len(sizes.windows)]
    expected = ran + triangles_for_squares(sizes, lengths)
    assert flops.prefill(model.config, 40, schedule, scorer) == expected


NOTED = {
    0.9: [1.45, 1.47, 1.49, 1.52, 1.58, 1.66, 1.74],
    0.8: [2.01, 2.04, 2.08, 2.15, 2.26, 2.42, 2.60],
    0.7: [2.66, 2.70, 2.75, 2.84, 3.00, 3.21, 3.45],
}
LENGTHS = [1024, 4096, 8192, 16384, 32768, 65536, 131072]


@pytest.mark.parametrize(
    ("config", "ratio", "tokens", "bound"),
    [
        *((QWEN2_7B, ratio, n, x) for ratio, bounds in NOTED.items() for n, x in zip(LENGTHS, bounds, strict=True)),
        (SMOLLM2, 0.9, 4096, 1.67),
        (SMOLLM2, 0.8, 2048, 2.31),
        (SMOLLM2, 0.7, 512, 2.89),
    ],
)
def test_bounds_of_the_reference_models(config, ratio, tokens, bound):
    schedule = PruningSchedule.geometric(num_layers=config.num_hidden_layers, start=4, step=3, ratio=ratio)
    assert flops.prefill(config, tokens) / flops.prefill(config, tokens, schedule) == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize(("config", "share"), [(QWEN2_7B, 0.001), (SMOLLM2, 0.01)])
@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.7])
@pytest.mark.parametrize("tokens", [384, 4096, 32768])
def test_scoring_with_all_that_the_scorer_sees_is_less_than_one_percent(config, share, ratio, tokens):
    schedule = PruningSchedule.geometric(num_layers=config.num_hidden_layers, start=4, step=3, ratio=ratio)
    scorer = scorers.Learned(
        config.hidden_size, schedule.stages, width=128, position=True, question_rank=32, neighbours=3, recency=0.25
    )
    scoring = flops.scoring(tokens, schedule, scorer)
    assert 0 < scoring < share * flops.prefill(config, tokens)


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        (SimpleNamespace(hidden_size=8), ValueError, "SimpleNamespace .*no causal language model"),
        (DeepseekV3Config(num_hidden_layers=1), ValueError, "DeepseekV3Config .*attention has 187105280 weights"),
        (DiffLlamaConfig(num_hidden_layers=1), ValueError, "DiffLlamaConfig .*self_attn.lambda_q1"),
        (OPTConfig(word_embed_proj_dim=32), ValueError, "OPTConfig .*project_(in|out).weight is a matrix outside"),
        (AriaTextConfig(num_hidden_layers=1), ValueError, "AriaTextConfig .*mlp.experts.gate_up_proj looks like exp"),
        (Llama4TextConfig(num_hidden_layers=4), TypeError, "Llama4ForCausalLM is not supported: .*chunked_attention"),
        (Gemma3Config(), TypeError, "Gemma3ForConditionalGeneration is not supported: .*vision_config"),
        (MambaConfig(num_hidden_layers=1), TypeError, "MambaForCausalLM is not supported"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(config, error, reason):
    with pytest.raises(error, match=reason):
        flops.prefill(config, 1024)


class ListConfig(LlamaConfig):
    model_type = "llama_with_lists"


class WithLists(LlamaForCausalLM):
    """Two MLPs a layer, as mixtures of experts once were: its modules do not say which of them a token meets."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = nn.ModuleList([layer.mlp, layer.mlp])


def test_a_list_of_mlps_is_not_counted_as_if_all_ran(monkeypatch):
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, ListConfig, WithLists)
    with pytest.raises(ValueError, match=r"ListConfig .*a layer's mlp is a list"):
        flops.prefill(ListConfig(**TINY), 1024)
