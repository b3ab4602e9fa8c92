"""Analytic FLOPs and KV-cache bytes of a decoder under a pruning schedule: arithmetic on the sizes a config implies.

A multiply-add counts as two operations. Counted: the matrix products of attention (projections, scores and values with
a causal triangle, cut to the window where a layer slides one), of the MLP or of the experts that a token passes through
with their router, the language-model head on one position, and the learned scorer. Norms, activations, position
embeddings and the embedding look-up are left out: below a percent of a prefill.

The sizes are read off the model itself, built from the config on torch's meta device: without storage, in about a tenth
of a second, with the random state untouched. Fused or plain projections, gated or plain MLPs, dense or sparse layers
are then what the model's own code makes of the config, and there is no table of families to be wrong or out of date.
What the reading does not understand to the last parameter is refused by name.

In a sliding layer a query sees `window` keys at most. That is exact for the unpruned model; the survivors inside a
window depend on which they are, so there a pruned layer's count, taken as if none were missing, is an upper bound, and
the speedup computed from it a lower one.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sdtp.pruning.adapter import architecture
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned, Scorer


@dataclasses.dataclass(frozen=True)
class Layer:
    """The sizes of one decoder layer that its FLOPs and cache depend on.

    Attributes:
        weights: weights that one token is multiplied with, of the experts only those that it passes through.
        query: query heads x head dimension.
        cached: values held for a cached token, its key and its value over all KV heads.
        window: most keys that a query sees, itself included; None for all before it.
    """

    weights: int
    query: int
    cached: int
    window: int | None

    def seen(self, tokens: int) -> int:
        """Keys that the last of `tokens` tokens sees, itself included."""
        return tokens if self.window is None else min(tokens, self.window)

    def held(self, tokens: int) -> int:
        """Tokens in the cache after `tokens`: of a window all but the oldest, which the next token no longer sees."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def pairs(self, tokens: int) -> int:
        """(query, key) pairs of a causal prefill: `seen(1) + ... + seen(tokens)`."""
        seen = self.seen(tokens)
        return seen * (seen + 1) // 2 + (tokens - seen) * seen

    def operations(self, tokens: int, pairs: int) -> int:
        """Operations of the weight products of `tokens` tokens and of the scores and values of `pairs` pairs."""
        return 2 * tokens * self.weights + 4 * pairs * self.query


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder that its FLOPs and cache depend on.

    Attributes:
        layers: each decoder layer's sizes.
        head: weights of the language-model head.
    """

    layers: tuple[Layer, ...]
    head: int

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Read them off the causal LM of a transformers config.

        Raises:
            ValueError: transformers has no causal LM for the config, or something in it is not counted: attention of
                another size than the config's heads make, a parameter that belongs to no matrix, norm, experts or
                router. The message names it.
            TypeError: a model whose layers pruning does not support, see `adapter.architecture`.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM  # here: they take seconds

        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _uncounted(config, "transformers has no causal language model for it")
        with torch.device("meta"):
            # A copy, because building writes into it; eager attention, because that is there for every model.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=False
            )
        parts = architecture(model)
        head = model.get_output_embeddings()
        elsewhere = {*parts.layers.modules(), head}
        for path, module in model.named_modules():
            if module not in elsewhere and not isinstance(module, nn.Embedding):
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim > 1:
                        raise _uncounted(config, f"{path}.{name} is a matrix outside its decoder layers")
        read = zip(parts.layers, parts.windows, strict=True)
        return cls(tuple(_layer(layer, window, parts.stack.config) for layer, window in read), head.weight.numel())


def _uncounted(config: Any, reason: str) -> ValueError:
    return ValueError(f"FLOPs of a {type(config).__name__} are not counted: {reason}")


def _layer(layer: nn.Module, window: int | None, config: Any) -> Layer:
    """Sum a layer's matrices, and check that those of its attention are the config's heads and nothing else."""
    experts = {parameter.shape[0] for parameter in layer.parameters() if parameter.ndim == 3}
    weights = attention = 0
    for path, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None:
            raise _uncounted(config, f"a layer's {path} is a list, and which of it a token meets is not known")
        if isinstance(module, nn.Linear | Conv1D):
            weights += module.weight.numel()
            attention += module.weight.numel() if "attn" in path or "attention" in path else 0
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}".lstrip(".")
            if name == "sinks" or "bias" in name or (parameter.ndim == 1 and "Norm" in type(module).__name__):
                continue  # added, or one factor a channel: no matrix product
            if parameter.ndim == 3:  # [experts, out, in], of which a token meets a few
                if getattr(config, "num_experts_per_tok", None) is None:
                    raise _uncounted(config, f"{full_name} looks like experts, but num_experts_per_tok is not set")
                weights += parameter[0].numel() * config.num_experts_per_tok
            elif parameter.ndim == 2 and experts == {parameter.shape[0]} and parameter.shape[1] == config.hidden_size:
                weights += parameter.numel()  # the router, [experts, hidden]
            else:
                raise _uncounted(config, f"a layer's {full_name} belongs to no matrix, norm, experts or router")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    expected = 2 * config.hidden_size * head_dim * (heads + kv_heads)  # queries and output, keys and values
    if attention != expected:
        raise _uncounted(
            config,
            f"a layer's attention has {attention} weights in its matrices, where {heads} heads and {kv_heads} KV heads "
            f"of {head_dim} make {expected}",
        )
    return Layer(weights, heads * head_dim, 2 * kv_heads * head_dim, window)


def _lengths(size: Dimensions, prompt_tokens: int, schedule: PruningSchedule | None) -> list[int]:
    """Tokens that each layer runs on in prefill."""
    if schedule is None:
        return [prompt_tokens] * len(size.layers)
    return schedule.layer_lengths(prompt_tokens, len(size.layers))


def prefill(
    config: Any, prompt_tokens: int, schedule: PruningSchedule | None = None, scorer: Scorer | None = None
) -> float:
    """Operations to prefill a prompt and get the logits of its last position.

    Exact for the unpruned model and for full attention; an upper bound for pruned layers that slide a window.

    Args:
        config: a transformers config of a decoder; see `Dimensions.of` for what is refused.
        prompt_tokens: `N` >= 1.
        schedule: the pruning schedule; None for the unpruned model.
        scorer: who decides, see `scoring`; None leaves scoring out.
    """
    size = Dimensions.of(config)
    lengths = _lengths(size, prompt_tokens, schedule)
    total = sum(layer.operations(n, layer.pairs(n)) for layer, n in zip(size.layers, lengths, strict=True))
    total += 2 * size.head
    if schedule is not None and scorer is not None:
        return total + scoring(prompt_tokens, schedule, scorer)
    return float(total)


def scoring(prompt_tokens: int, schedule: PruningSchedule, scorer: Scorer) -> float:
    """Operations of the learned scorer over the tokens entering each stage that removes some; others do not score.

    Of any other scorer 0: the baselines need next to nothing, and no product.
    """
    if not isinstance(scorer, Learned):
        return 0.0
    counts = [prompt_tokens, *schedule.surviving(prompt_tokens)]
    return float(sum(2 * scorer.multiply_adds(n) for n, left in itertools.pairwise(counts) if left < n))


def decode(config: Any, prompt_tokens: int, new_tokens: int, schedule: PruningSchedule | None = None) -> float:
    """Operations to generate `new_tokens` after prefill: `new_tokens - 1` steps, the first token came with prefill.

    Exact where `prefill` is, and an upper bound where that is one.
    """
    size = Dimensions.of(config)
    lengths = _lengths(size, prompt_tokens, schedule)
    total = 0
    for done in range(1, new_tokens):
        total += sum(layer.operations(1, layer.seen(n + done)) for layer, n in zip(size.layers, lengths, strict=True))
        total += 2 * size.head
    return float(total)


def cache_bytes(
    config: Any, prompt_tokens: int, schedule: PruningSchedule | None = None, bytes_per_value: int = 4
) -> int:
    """Bytes of the keys and values held after prefill.

    A sliding layer holds `window - 1` tokens at most: what the next token sees besides itself.
    """
    size = Dimensions.of(config)
    lengths = _lengths(size, prompt_tokens, schedule)
    values = sum(layer.held(n) * layer.cached for layer, n in zip(size.layers, lengths, strict=True))
    return values * bytes_per_value
