"""Ways of going on with a prompt's KV cache, each with what it must give under a pruner; see `generation_modes`."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import torch
from transformers import QuantizedCache
from transformers.utils import is_optimum_quanto_available

from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.prefill import Trace
from sdtp.verification.generation_modes import greedy
from sdtp.verification.trial import MismatchError, NotRunError, Trial, cache_in, largest, worst, worst_step


def several_turns(trial: Trial) -> float:
    """A second turn generated on the cache of the first."""
    with trial.pruned() as trace:
        first = trial.generate(trial.prompt)
        ids = torch.cat([first.sequences, trial.tokens(5, seed=2)], dim=1)
        second = trial.generate(ids, cache=cache_in(first))
    expected = trial.expected(trace, second.sequences)
    return largest([
        worst_step(first.logits, expected, trial.prompt.shape[1]), worst_step(second.logits, expected, ids.shape[1])
    ])  # fmt: skip


def several_tokens_at_once(trial: Trial) -> float:
    """Forwards of several new tokens on the prompt's cache."""
    turns = [trial.tokens(5, seed=3), trial.tokens(3, seed=4), trial.tokens(1, seed=5)]
    with trial.pruned() as trace:
        cache = cache_in(trial.forward(trial.prompt, use_cache=True))
        found = [trial.forward(turn, cache=cache, use_cache=True).logits for turn in turns]
    expected = trial.expected(trace, torch.cat([trial.prompt, *turns], dim=1))
    return worst(torch.cat(found, dim=1), expected[:, trial.prompt.shape[1] :])


def _following(trial: Trial, trace: Trace, found: torch.Tensor, tokens: torch.Tensor) -> float:
    """|Δ| of the logits of new tokens after the prompt."""
    expected = trial.expected(trace, torch.cat([trial.prompt, tokens], dim=1))
    return worst(found, expected[:, trial.prompt.shape[1] :])


def copied_cache(trial: Trial) -> float:
    """The prompt's cache and a copy of it, gone on with differently in another context."""
    one, other = trial.tokens(4, seed=6), trial.tokens(4, seed=7)
    with trial.pruned() as trace:
        cache = cache_in(trial.forward(trial.prompt, use_cache=True))
    with trial.pruned():
        copied = trial.forward(one, cache=copy.deepcopy(cache), use_cache=True).logits
        own = trial.forward(other, cache=cache, use_cache=True).logits
    return largest([_following(trial, trace, copied, one), _following(trial, trace, own, other)])


def crop(trial: Trial) -> float:
    """Tokens after the prompt taken back, and others put in their place."""
    others = trial.tokens(4, seed=9)
    with trial.pruned() as trace:
        cache = cache_in(trial.forward(trial.prompt, use_cache=True))
        cache.activate_past_recording()
        trial.forward(trial.tokens(6, seed=8), cache=cache, use_cache=True)
        cache.crop(-6)
        found = trial.forward(others, cache=cache, use_cache=True).logits
    return _following(trial, trace, found, others)


def document_cache(trial: Trial) -> float:
    """One pruned document and two questions, each on a copy of its cache."""
    document = trial.prompt
    if trial.pruner is None:
        cache = cache_in(trial.forward(document, use_cache=True))
    else:
        cache = trial.pruner.cache_document(trial.model, document)
    with trial.pruned() as trace:
        trial.forward(document)  # for its trace
        questions = [torch.cat([document, trial.tokens(6, seed)], dim=1) for seed in (10, 11)]
        answers = [trial.generate(ids, cache=copy.deepcopy(cache)) for ids in questions]
    columns = questions[0].shape[1]
    return largest([worst_step(out.logits, trial.expected(trace, out.sequences), columns) for out in answers])


def quantised_cache(trial: Trial) -> float:
    """A quantised cache: what a dynamic one gives whose survivors were rounded by the same quantiser."""
    if not is_optimum_quanto_available():
        raise NotRunError("optimum-quanto is not installed")
    tokens = trial.tokens(4, seed=12)
    with trial.pruned() as trace:
        rounded = cache_in(trial.forward(trial.prompt, use_cache=True))
        # Groups are cut from each layer's numbers in a row: of a size that divides one token's, as real models' do.
        width = math.gcd(64, *(_held(layer).keys[0, :, 0].numel() for layer in rounded.layers))
        quantised = QuantizedCache(backend="quanto", config=trial.config, q_group_size=width)
        first = trial.forward(trial.prompt, cache=quantised, use_cache=True).logits
        for layer, source in zip(rounded.layers, quantised.layers, strict=True):
            held, coded = _held(layer), _held(source)
            held.keys = coded._dequantize(coded._quantized_keys)
            held.values = coded._dequantize(coded._quantized_values)
        differences = [
            worst(*(trial.forward(token[:, None], cache=c, use_cache=True).logits for c in (quantised, rounded)))
            for token in tokens.unbind(1)
        ]
    return largest([worst(first, trial.expected(trace, trial.prompt)[:, trial.survivors(trace)]), *differences])


def _held(layer: Any) -> Any:
    """The layer of transformers' own that has the keys and values."""
    return layer.held if isinstance(layer, PrunedLayer) else layer


def offloaded_cache(trial: Trial) -> float:
    """Greedy decoding with a cache that keeps all layers but the running one on the CPU."""
    if not torch.accelerator.is_available():
        raise NotRunError("there is no accelerator to offload from")
    return greedy(trial, cache_implementation="offloaded")


def outside_the_context(trial: Trial) -> float:
    """A pruned cache gone on with after the context: one token is right or refused, several are refused."""
    with trial.pruned() as trace:
        cache = cache_in(trial.forward(trial.prompt, use_cache=True))
    if trial.pruner is not None:
        try:
            trial.forward(trial.tokens(3, seed=13), cache=copy.deepcopy(cache), use_cache=True)
        except RuntimeError:
            pass
        else:
            raise MismatchError("several tokens were taken, although layers differ in length there")
    token = trial.tokens(1, seed=14)
    return _following(trial, trace, trial.forward(token, cache=cache, use_cache=True).logits, token)


def after_the_context(trial: Trial) -> float:
    """The model is as before, also after an exception inside."""
    before = trial.forward(trial.prompt).logits
    with contextlib.suppress(_StopError), trial.pruned():
        trial.forward(trial.prompt)
        raise _StopError
    if not torch.equal(before, trial.forward(trial.prompt).logits):
        raise MismatchError("logits after the context are not those before it")
    return 0.0


class _StopError(Exception):
    pass
