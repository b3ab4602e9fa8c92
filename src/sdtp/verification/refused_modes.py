"""Ways of calling a model that layers of unequal length cannot serve: a pruner has to refuse them, or be right.

Modes as in `generation_modes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdtp.verification.generation_modes import greedy
from sdtp.verification.trial import MismatchError, NotRunError, Trial, cache_in, worst


def static_cache(trial: Trial) -> float:
    """A cache of one fixed length for all layers."""
    return greedy(trial, cache_implementation="static")


def without_cache(trial: Trial) -> float:
    """The whole sequence fed anew at every step."""
    return greedy(trial, use_cache=False)


def chunked_prefill(trial: Trial) -> float:
    """A prompt fed in parts."""
    return greedy(trial, prefill_chunk_size=max(1, trial.prompt.shape[1] // 3))


def labels(trial: Trial) -> float:
    """A loss over every token."""
    return _must_refuse(trial, lambda: trial.forward(trial.prompt, labels=trial.prompt))


def output_hidden_states(trial: Trial) -> float:
    """States of every layer at every token."""
    return _must_refuse(trial, lambda: trial.forward(trial.prompt, output_hidden_states=True))


def output_attentions(trial: Trial) -> float:
    """Attention of every layer between all tokens."""
    return _must_refuse(trial, lambda: trial.forward(trial.prompt, output_attentions=True))


def logits_past_the_tail(trial: Trial) -> float:
    """Logits of more last tokens than are sure to survive."""
    tokens = trial.prompt.shape[1]
    with trial.pruned() as trace:
        found = trial.forward(trial.prompt, logits_to_keep=tokens).logits
    return worst(found, trial.expected(trace, trial.prompt))


def continuous_batching(trial: Trial) -> float:
    """`generate_batch`, whose paged cache has one length for all layers."""
    if not hasattr(trial.model, "generate_batch"):
        raise NotRunError("the model has no generate_batch")
    return _must_refuse(trial, lambda: trial.model.generate_batch(trial.prompt.tolist()))


def crop_into_the_prompt(trial: Trial) -> float:
    """A cut that would need removed tokens back."""
    return _must_refuse(trial, lambda: cache_in(trial.forward(trial.prompt, use_cache=True)).crop(-2))


def second_pruner(trial: Trial) -> float:
    """A pruner inside the context of one."""

    def attach() -> None:
        with trial.pruned():
            trial.forward(trial.prompt)

    return _must_refuse(trial, attach)


def _must_refuse(trial: Trial, call: Callable[[], Any]) -> float:
    """Let the refusal of `call` through; whatever it gives instead is wrong."""
    with trial.pruned():
        call()
    raise MismatchError("it was accepted")
