"""A cache that nobody holds is freed at once: on a GPU, tensors in a cycle stay until Python looks for cycles."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from sdtp import TokenPruner, scorers
from sdtp.pruning.cache_store import load_cache, save_cache
from tests.pruning.tiny import prompt, schedule_for

IDS, REAL = prompt(40, 23)
SCORERS = {
    "random": scorers.Random(4),
    "last query": scorers.LastQuery(),
    "learned": scorers.Learned(32, 2, width=8, question_rank=8),
}


@pytest.fixture(autouse=True)
def _without_a_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def forward(model, **given):
    with torch.no_grad():
        return model(IDS, attention_mask=REAL, use_cache=True, **given).cache


def generate(model, **settings):
    return model.generate(
        IDS, attention_mask=REAL, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, **settings,
    ).cache  # fmt: skip


CALLS = {
    "forward": forward,
    "forward, own cache": lambda model: forward(model, cache=DynamicCache()),
    "forward, quantised": lambda model: forward(model, cache=QuantizedCache(backend="fp8", config=model.config)),
    "generate": generate,
    "beams": lambda model: generate(model, num_beams=2),
    "prompt lookup": lambda model: (
        model.generate(IDS[:1], max_new_tokens=4, prompt_lookup_num_tokens=3, return_dict_in_generate=True).cache
    ),
}


def watched(cache):
    """Weak references to a cache, its layers and what they hold; positions may be those the trace tells of."""
    held = [cache, *cache.layers]
    for layer in cache.layers:
        held += [part for part in (layer.keys, layer.values) if part is not None]
        held += [layer.columns] if hasattr(layer, "columns") else []
    return [weakref.ref(one) for one in held]


def alive(references):
    return [type(one()).__name__ for one in references if one() is not None]


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in CALLS), *(("gemma3", name) for name in CALLS if name != "forward, quantised")],
)
@pytest.mark.parametrize("pruned", [True, False])
def test_after_a_prefill(tiny_model, family, name, pruned):
    model = tiny_model(family)
    if not pruned:
        references = watched(CALLS[name](model))
    else:
        with TokenPruner(schedule_for(family), scorers.Random(4))(model) as trace:
            references = watched(CALLS[name](model))
            assert not alive(references)
            last = CALLS[name](model)
            references = watched(last)
        del last
        assert trace.kept
    assert len(references) > 10
    assert not alive(references)


@pytest.mark.parametrize("name", SCORERS)
def test_whoever_scores(tiny_model, name):
    model = tiny_model()
    with TokenPruner(schedule_for("llama"), SCORERS[name])(model) as trace:
        cache = forward(model) if name != "last query" else generate(model)
        references = watched(cache)
        del cache
        assert not alive(references)
    assert trace.kept


def test_after_turns_copies_and_files(tiny_model, tmp_path):
    model = tiny_model()
    pruner = TokenPruner(schedule_for("llama"), scorers.Random(4))
    with torch.no_grad(), pruner(model):
        cache = model(IDS[:1]).cache
        model(IDS[:1, :3], cache=cache)
        cache.crop(-2)
    with torch.no_grad():
        model(IDS[:1, :1], cache=cache)
    save_cache(cache, tmp_path / "cache.safetensors", model)
    copied, loaded = copy.deepcopy(cache), load_cache(tmp_path / "cache.safetensors", model)
    copied.batch_repeat_interleave(2)
    copied.reorder_cache(torch.tensor([1, 0]))
    for one in (copied, loaded):  # each knows its own layers, none the original's
        assert one.layers[0].later == one.layers[1:]
    references = [watched(one) for one in (cache, copied, loaded)]
    del one, cache
    assert not alive(references[0])
    assert alive(references[1]) and alive(references[2])  # noqa: PT018
    del copied, loaded
    assert not alive(references[1] + references[2])


def test_after_a_failure(tiny_model):
    class Broken:
        question_conditioned = False

        def score(self, view):
            return torch.full(view.positions.shape, torch.nan)

    model, cache = tiny_model(), DynamicCache()
    with TokenPruner(schedule_for("llama"), Broken())(model), pytest.raises(ValueError, match="NaN scores"):
        forward(model, cache=cache)
    references = watched(cache)
    del cache
    gc.collect()  # the exception and its traceback are a cycle of pytest's
    assert not alive(references)
