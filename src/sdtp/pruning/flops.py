"""Analytic FLOPs and KV-cache bytes of a decoder under a pruning schedule: pure arithmetic on a config.

A multiply-add counts as two operations. Counted: the matrix products of attention (projections, scores and values with
a causal triangle) and of the gated or plain MLP, the language-model head on one position, and the learned scorer.
Norms, activations, rotary embeddings and the embedding look-up are left out: below a percent of a prefill.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sdtp.pruning.schedule import PruningSchedule


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder that its FLOPs and cache depend on, read from a transformers config."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    mlp_matrices: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Read `num_hidden_layers`, `hidden_size`, ... of a config; no count of KV heads means multi-head.

        Raises:
            ValueError: a mixture of experts, whose tokens pass through a part of its weights only.
        """
        for experts in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(config, experts, None):
                raise ValueError(
                    f"FLOPs of a mixture of experts ({experts}={getattr(config, experts)}) are not counted"
                )
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            mlp_matrices=3 if hasattr(config, "num_key_value_heads") else 2,
            vocabulary=config.vocab_size,
        )

    @property
    def per_token(self) -> int:
        """Operations of one layer's weight products for one token."""
        q_and_o = 2 * self.hidden * self.heads * self.head_dim
        k_and_v = 2 * self.hidden * self.kv_heads * self.head_dim
        return 2 * (q_and_o + k_and_v + self.mlp_matrices * self.hidden * self.intermediate)

    @property
    def per_pair(self) -> int:
        """Operations of one layer's attention for one (query, key) pair: scores and values."""
        return 4 * self.heads * self.head_dim


def prefill(config: Any, prompt_tokens: int, schedule: PruningSchedule | None = None, scorer_width: int = 0) -> float:
    """Operations to prefill a prompt and get the logits of its last position.

    Args:
        config: a transformers config of a Llama-like decoder.
        prompt_tokens: `N` >= 1.
        schedule: the pruning schedule; None for the unpruned model.
        scorer_width: hidden units of the learned scorer; 0 leaves scoring out.
    """
    size = Dimensions.of(config)
    lengths = [prompt_tokens] * size.layers if schedule is None else schedule.layer_lengths(prompt_tokens, size.layers)
    total = float(sum(n * size.per_token + n * (n + 1) // 2 * size.per_pair for n in lengths))
    total += 2 * size.hidden * size.vocabulary
    if schedule is not None and scorer_width:
        total += scoring(config, prompt_tokens, schedule, scorer_width)
    return total


def scoring(config: Any, prompt_tokens: int, schedule: PruningSchedule, scorer_width: int) -> float:
    """Operations of the learned scorer (hidden -> width -> 2) over the tokens entering each stage."""
    entering = [prompt_tokens, *schedule.surviving(prompt_tokens)[:-1]] if schedule.stages else []
    return float(sum(entering) * 2 * (config.hidden_size * scorer_width + 2 * scorer_width))


def decode(config: Any, prompt_tokens: int, new_tokens: int, schedule: PruningSchedule | None = None) -> float:
    """Operations to generate `new_tokens` after prefill: `new_tokens - 1` steps, the first token came with prefill."""
    size = Dimensions.of(config)
    lengths = [prompt_tokens] * size.layers if schedule is None else schedule.layer_lengths(prompt_tokens, size.layers)
    total = 0
    for done in range(1, new_tokens):
        total += sum(size.per_token + (n + done) * size.per_pair for n in lengths) + 2 * size.hidden * size.vocabulary
    return float(total)


def cache_bytes(
    config: Any, prompt_tokens: int, schedule: PruningSchedule | None = None, bytes_per_value: int = 4
) -> int:
    """Bytes of the keys and values held after prefill."""
    size = Dimensions.of(config)
    lengths = [prompt_tokens] * size.layers if schedule is None else schedule.layer_lengths(prompt_tokens, size.layers)
    return sum(lengths) * 2 * size.kv_heads * size.head_dim * bytes_per_value
