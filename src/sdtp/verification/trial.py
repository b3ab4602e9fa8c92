"""One model, one pruner and one prompt: what every way of calling the model is tried with, and compared against."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from sdtp.pruning.adapter import cache_of
from sdtp.pruning.decoding import greedy_settings
from sdtp.pruning.prefill import Trace
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.wrappers import unwrap
from sdtp.verification.hidden_keys import masked_logits


class MismatchError(Exception):
    """What a mode gave is wrong in another way than by its logits."""


class NotRunError(Exception):
    """A mode does not apply here, with the reason."""


class Float64Throughout(TorchFunctionMode):
    """Inside, a model of float64 weights computes in float64 alone.

    Models take norms, rotary tables and some softmaxes in float32 whatever their weights are, and `generate` returns
    float32 logits: each costs the digits that a comparison to 1e-9 needs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, with float64 wherever it was told float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        told = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **told)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a mode is run with.

    Attributes:
        model: a causal LM.
        pruner: what is tried; None for the unpruned model, which every mode also fits.
        prompt: LongTensor [1, tokens] without padding.
        tolerance: the largest difference between two logits that counts as rounding.
        new_tokens: tokens each generation adds.
    """

    model: Any
    pruner: TokenPruner | None
    prompt: torch.Tensor
    tolerance: float
    new_tokens: int = 8

    @property
    def inner(self) -> Any:
        """The transformers model inside wrappers."""
        return unwrap(self.model)

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.inner.config.get_text_config(decoder=True)

    def pruned(self, **options: Any) -> contextlib.AbstractContextManager[Trace]:
        """The pruner's context; without a pruner the trace stays empty."""
        return contextlib.nullcontext(Trace()) if self.pruner is None else self.pruner(self.model, **options)

    def tokens(self, count: int, seed: int, rows: int = 1) -> torch.Tensor:
        """LongTensor [rows, count] of random tokens, the same for a seed."""
        vocabulary = self.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        low = min(3, vocabulary - 1)  # special tokens tend to come first
        return torch.randint(low, vocabulary, (rows, count), generator=generator).to(self.prompt.device)

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """The model's output."""
        with torch.no_grad():
            return self.model(input_ids=input_ids, **inputs)

    def generate(self, input_ids: torch.Tensor | None = None, **settings: Any) -> Any:
        """What `generate` returns, greedy unless told otherwise, with the logits of each step.

        The model's own generation settings are put aside where they would end early or choose by another rule.
        """
        plain = {
            **greedy_settings(self.new_tokens),
            "eos_token_id": None,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        given = {} if input_ids is None else {"input_ids": input_ids}
        return self.model.generate(**given, **{**plain, **settings})

    def expected(
        self,
        trace: Trace,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] by `hidden_keys.masked_logits`, of a prompt as long as the trial's."""
        columns = self.prompt.shape[1]
        layers = self.pruner.schedule.layers[: len(trace.kept)] if self.pruner is not None else ()
        return masked_logits(self.model, input_ids, layers, trace.kept, columns, attention_mask, position_ids)

    def survivors(self, trace: Trace) -> torch.Tensor:
        """LongTensor [kept]: the prompt tokens that a forward over the prompt returns logits of."""
        tokens = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        return trace.kept[-1][0].to(self.prompt.device) if trace.kept else tokens


def cache_in(output: Any) -> Cache:
    """The KV cache that a forward pass or `generate` returned."""
    cache: Cache | None = cache_of(output)
    if cache is None:
        raise NotRunError("the model returns no cache")
    return cache


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest |Δ| between two tensors; NaN where one has any.

    Raises:
        MismatchError: they differ in shape.
    """
    if found.shape != expected.shape:
        raise MismatchError(f"logits of shape {tuple(found.shape)} where {tuple(expected.shape)} is due")
    return (found.double() - expected.to(found.device).double()).abs().max().item()


def worst_step(logits: Sequence[torch.Tensor], expected: torch.Tensor, prompt_columns: int) -> float:
    """The largest |Δ| over the steps of a generation.

    Args:
        logits: per step [batch, vocabulary], as `generate` returns them.
        expected: [batch, tokens, vocabulary] over the prompt and what was generated.
        prompt_columns: the first step's logits belong to the last of these.
    """
    if not logits:
        raise MismatchError("nothing was generated")
    return largest(worst(step, expected[:, prompt_columns - 1 + i]) for i, step in enumerate(logits))


def largest(differences: Iterable[float]) -> float:
    """The largest of some differences; NaN if any is."""
    found = list(differences)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def same_tokens(found: torch.Tensor, due: torch.Tensor, logits: torch.Tensor, tolerance: float) -> None:
    """Check that two generations from one prompt agree, up to a tie in the logits that rounding may decide.

    Args:
        found, due: LongTensor [tokens] of generated tokens.
        logits: [tokens, vocabulary] at each step of `due`.
        tolerance: the largest difference between two logits that counts as rounding.

    Raises:
        MismatchError: they part where the two tokens' logits do not tie, or differ in length.
    """
    if len(found) != len(due):
        raise MismatchError(f"{len(found)} new tokens where {len(due)} are due")
    for step, (one, other) in enumerate(zip(found.tolist(), due.tolist(), strict=True)):
        if one != other:
            gap = abs(logits[step, one].item() - logits[step, other].item())
            if not gap <= 2 * tolerance:  # NaN is not
                raise MismatchError(f"new token {step} is {one} where {other} is due")
            return
