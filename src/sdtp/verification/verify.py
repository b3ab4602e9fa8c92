"""Mask equals removal, on any supported model: the checks a user can run on their own weights and prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from sdtp.pruning.prefill import Trace
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.wrappers import unwrap
from sdtp.verification import cache_modes, generation_modes, refused_modes
from sdtp.verification.hidden_keys import masked_logits
from sdtp.verification.trial import Float64Throughout, MismatchError, NotRunError, Trial, worst

MODES: MappingProxyType[str, Callable[[Trial], float]] = MappingProxyType({
    "plain forward": generation_modes.plain_forward,
    "ratio 1.0, bit for bit": generation_modes.nothing_removed,
    "ratio of one call": generation_modes.another_ratio,
    "protected tokens": generation_modes.protected_tokens,
    "greedy": generation_modes.greedy,
    "sampling": generation_modes.sampling,
    "beam search": generation_modes.beam_search,
    "num_return_sequences": generation_modes.return_sequences,
    "prompt lookup": generation_modes.prompt_lookup,
    "assisted decoding": generation_modes.assisted_decoding,
    "left-padded batch": generation_modes.left_padded_batch,
    "right-padded forward": generation_modes.right_padded_forward,
    "inputs_embeds": generation_modes.inputs_embeds,
    "custom position_ids": generation_modes.custom_position_ids,
    "processor, criteria, streamer": generation_modes.processor_criteria_streamer,
    "several turns on one cache": cache_modes.several_turns,
    "several new tokens at once": cache_modes.several_tokens_at_once,
    "copied cache": cache_modes.copied_cache,
    "crop after the prompt": cache_modes.crop,
    "document cache, 2 questions": cache_modes.document_cache,
    "quantised cache, same rounding": cache_modes.quantised_cache,
    "offloaded cache": cache_modes.offloaded_cache,
    "cache outside the context": cache_modes.outside_the_context,
    "model after the context": cache_modes.after_the_context,
    "static cache": refused_modes.static_cache,
    "use_cache=False": refused_modes.without_cache,
    "chunked prefill": refused_modes.chunked_prefill,
    "labels": refused_modes.labels,
    "output_hidden_states": refused_modes.output_hidden_states,
    "output_attentions": refused_modes.output_attentions,
    "logits_to_keep past the tail": refused_modes.logits_past_the_tail,
    "crop into the prompt": refused_modes.crop_into_the_prompt,
    "continuous batching": refused_modes.continuous_batching,
    "a second pruner": refused_modes.second_pruner,
})  # fmt: skip
"""Name of each mode, and the check of it."""

# |Δ logit| / max |logit| that counts as rounding; of formats of 16 bits, 8 rounding steps. Seen on SmolLM2-135M with 96
# tokens: 3e-6 in float32, 3 steps in bfloat16 and float16.
ROUNDING = MappingProxyType({
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
})  # fmt: skip

Verdict = Literal["exact", "refused", "wrong", "not run"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one mode.

    Attributes:
        mode: its name.
        verdict: `exact` within the tolerance, `refused` by the pruner on purpose, `not run` where it does not apply, or
            else `wrong`.
        difference: the largest |Δ logit|; None where nothing was compared.
        reason: why it is not exact; empty if it is.
    """

    mode: str
    verdict: Verdict
    difference: float | None = None
    reason: str = ""


class Verification:
    """The equality checks of a pruner on a model, with one prompt.

    The reference is a forward of the unpruned model in which removed tokens are hidden as keys, see `hidden_keys`.

    Args:
        model: a causal LM that `pruner` supports, in eval mode.
        pruner: what is tried.
        prompt: LongTensor [1, tokens] without padding, on the model's device.

    Attributes:
        largest_logit: largest |logit| of the unpruned model at the prompt.
        tolerance: largest |Δ logit| that counts as rounding.
        reference_error: largest |Δ logit| between the unpruned model and the reference with nothing hidden.
        effect: largest |Δ logit| that pruning makes at the prompt's last token: what a check has to tell from rounding.
        survivors: prompt tokens left after each stage.

    Raises:
        TypeError: the pruner does not support the model, or the weights' number format is not known here.
        ValueError: more than one row, a pruner that removes nothing from the prompt, or logits that are not finite; and
            what the pruner's context raises.
    """

    def __init__(self, model: nn.Module, pruner: TokenPruner, prompt: torch.Tensor) -> None:
        inner: Any = unwrap(model)
        dtype: torch.dtype = inner.dtype
        if dtype not in ROUNDING:
            raise TypeError(f"weights of {dtype} are not verified: one of {', '.join(map(str, ROUNDING))} is needed")
        _check_prompt(pruner, prompt)
        self._context = Float64Throughout if dtype == torch.float64 else contextlib.nullcontext
        plain = Trial(model, None, prompt, tolerance=0.0)
        with self._context():
            unpruned = plain.forward(prompt).logits
            with pruner(model) as trace:
                last = plain.forward(prompt, logits_to_keep=1).logits
            self.reference_error = worst(plain.expected(Trace(), prompt), unpruned)
        self.largest_logit = unpruned.abs().max().item()
        if not math.isfinite(self.largest_logit):
            raise ValueError(f"the unpruned model's logits are not finite in {dtype}: try another number format")
        self.tolerance = ROUNDING[dtype] * self.largest_logit
        self.effect = worst(last, unpruned[:, -1:])
        self.survivors = [kept.shape[1] for kept in trace.kept]
        self._trial = dataclasses.replace(plain, pruner=pruner, tolerance=self.tolerance)

    def reference(self) -> Result:
        """Whether the reference is the unpruned model where nothing is hidden: without that the rest means nothing."""
        return self._judged("reference, nothing hidden", self.reference_error)

    def run(self, mode: str) -> Result:
        """Try one of `MODES`."""
        try:
            with self._context():
                difference = MODES[mode](self._trial)
        except NotRunError as reason:
            return Result(mode, "not run", None, str(reason))
        except MismatchError as error:
            return Result(mode, "wrong", None, str(error))
        except Exception as error:
            if _is_refusal(error):
                return Result(mode, "refused", None, _one_line(error))
            return self._failed(mode, error)
        return self._judged(mode, difference)

    def _judged(self, mode: str, difference: float) -> Result:
        if difference <= self.tolerance:  # NaN is not
            return Result(mode, "exact", difference)
        return Result(mode, "wrong", difference, f"|Δ logit| up to {difference:.1e}")

    def _failed(self, mode: str, error: Exception) -> Result:
        """A mode that broke down: not run if the unpruned model cannot do it either."""
        told = f"{type(error).__name__}: {_one_line(error)}"
        try:
            with self._context():
                MODES[mode](dataclasses.replace(self._trial, pruner=None))
        except Exception as unpruned:
            return Result(mode, "not run", None, f"the unpruned model fails as well: {_one_line(unpruned)}")
        return Result(mode, "wrong", None, told)


def _check_prompt(pruner: TokenPruner, prompt: torch.Tensor) -> None:
    if prompt.shape[0] != 1:
        raise ValueError(f"the prompt has {prompt.shape[0]} rows: verification takes one prompt at a time")
    tokens = prompt.shape[1]
    if pruner.schedule.surviving(tokens)[-1:] in ([], [tokens]):
        raise ValueError(f"the pruner removes nothing from a prompt of {tokens} tokens: there is nothing to verify")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_refusal(error: Exception) -> bool:
    """Whether this package raised the error on purpose: its last frame is a `raise` of the pruning room."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    room = Path(inspect.getfile(TokenPruner)).parent
    return Path(last.filename).parent == room and str(last.line).startswith("raise ")


def mask_equals_removal(model: nn.Module, pruner: TokenPruner, input_ids: torch.Tensor) -> float:
    """How far a pruned prefill is from the unpruned graph in which the removed tokens are hidden as keys.

    Both give the same logits at every survivor of the last stage, up to rounding: what is physically removed is exactly
    what later layers can no longer attend to. `Verification` checks every other way of calling the model as well.

    Args:
        model: a causal LM that `pruner` supports.
        pruner: decides what is removed, in at least one stage; the masked forward replays its trace.
        input_ids: LongTensor [1, tokens], a prompt without padding.

    Returns:
        max |Δ logit| / max |logit| over the survivors.

    Raises:
        ValueError: more than one row, or a schedule without stages.
    """
    if not pruner.schedule.stages:
        raise ValueError("the schedule has no stages: nothing is removed")
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has {input_ids.shape[0]} rows: verification takes one prompt at a time")
    with torch.no_grad(), pruner(model) as trace:
        removed: torch.Tensor = model(input_ids).logits  # with its cache, which LastQuery reads
    masked = masked_logits(model, input_ids, pruner.schedule.layers, trace.kept, input_ids.shape[1])
    masked = masked[:, trace.kept[-1][0].to(masked.device)]
    return worst(removed, masked) / masked.abs().max().item()
