"""Shared fixtures: fixed seeds and tiny random models."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TINY = {
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
    "initializer_range": 0.2,  # the default 0.02 makes tiny random models nearly position-blind
}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


# A shell that starts the tests in its background has them ignore Ctrl-C, and every process they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def isolated_randomness() -> Iterator[None]:
    """Every test starts from the same seed and default dtype, whatever ran before it."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Factory of tiny random causal LMs: `tiny_model(family="llama", dtype=torch.float32, **config)`, eval mode."""

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa", **config: Any
    ) -> PreTrainedModel:
        config_class, model_class, extra = FAMILIES[family]
        torch.manual_seed(1234)
        model = model_class(config_class(**{**TINY, **extra, **config}, attn_implementation=attention))
        return model.to(dtype).eval().requires_grad_(False)

    return make
