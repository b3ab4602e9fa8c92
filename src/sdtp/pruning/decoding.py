"""Greedy decoding by the model's logits alone, whatever settings of its own a model comes with."""

from __future__ import annotations

from typing import Any

# What tokens mean, and by which cache and in what pieces the logits are computed: these stay the model's own.
_OF_THE_MODEL = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "low_memory",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "transformers_version",
    }
)


def greedy_settings(max_new_tokens: int, min_new_tokens: int = 0) -> dict[str, Any]:
    """Settings with which `generate` takes the token of the highest logit at every step, and nothing else ends it.

    A model's `generation_config` goes into `generate` wherever the call says nothing: penalties on tokens that the
    prompt has (Qwen2's chat models come with one), forbidden and forced tokens, limits. Every setting that the
    installed transformers knows is in the result, hence, at the library's default.

    Args:
        max_new_tokens: most tokens to generate, >= 1.
        min_new_tokens: so many come before any stop token.

    Returns:
        Keyword arguments of `generate`. Stop tokens, the cache and how it is filled remain the model's.
    """
    from transformers import GenerationConfig  # here, because it takes seconds

    known = vars(GenerationConfig())
    defaults = GenerationConfig._get_default_generation_params()
    plain = {name: defaults.get(name) for name in known if not name.startswith("_") and name not in _OF_THE_MODEL}
    lengths = {
        "max_length": None,
        "min_length": None,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
    }
    return {**plain, **lengths}
