"""Tiny random models of the families that are verified in every way of calling them."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

WINDOW = 12  # of the families with sliding windows: smaller than most prompts

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # the default 0.02 makes tiny random models nearly blind to positions
}
# The grouped kernel that experts use by default has no float64.
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

FAMILIES: MappingProxyType[str, tuple[str, dict[str, Any]]] = MappingProxyType({
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
    # Two rotary tables: theta 10,000 in sliding layers, 1,000,000 in full ones.
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt_neox": ("gpt_neox", {}),  # rotates a quarter of each head
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # learned positions
    "bloom": ("bloom", {"n_layer": 4, "n_head": 4}),  # ALiBi
    "mixtral": ("mixtral", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
})  # fmt: skip
"""Name of each family: the model type and what its config differs in."""


def tiny_model(family: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> PreTrainedModel:
    """A random model of one of `FAMILIES` for inference, the same every time.

    Args:
        family: its name.
        dtype: of the weights.
        attention: the kernel; a family that has the eager one alone gets that.
    """
    model_type, own = FAMILIES[family]
    config = CONFIG_MAPPING[model_type](**{**SIZES, **own})
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attention == "sdpa" and not model_class._supports_sdpa:
        attention = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    made: PreTrainedModel = model.to(dtype).eval().requires_grad_(False)
    return made
