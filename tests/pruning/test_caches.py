"""Every cache of transformers under a pruner: right at every step, or refused by name before anything ran.

Quantised caches are held against transformers' own quantised layers, filled by hand with the survivors' keys and values
of the unpruned, hard-masked model and decoded through explicit masks.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from sdtp import TokenPruner, scorers
from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.cache_store import save_cache
from tests.conftest import WINDOW
from tests.pruning.reference import additive, decoder_layers, masked_logits, rewritten, visible_keys
from tests.pruning.tiny import assert_close, float64, prompt, schedule_for

SETTINGS = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches of transformers need CUDA")
# quanto compiles a small C++ extension when it is first used.
NO_QUANTO = pytest.mark.skipif(
    not (is_optimum_quanto_available() and shutil.which("ninja") and shutil.which("c++")),
    reason="optimum-quanto, ninja or a C++ compiler is not installed",
)
NO_HQQ = pytest.mark.skipif(not is_hqq_available(), reason="hqq is not installed")


def generated(model, family, cache, *lengths, **settings):
    """Checks a generation with a cache against the reference at every step; returns the cache it came back with."""
    ids, real = prompt(*lengths)
    schedule = schedule_for(family)
    with float64():
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            out = model.generate(ids, attention_mask=real, cache=cache, max_new_tokens=8, **SETTINGS, **settings)
        everything = torch.cat([real, torch.ones(len(lengths), 8, dtype=real.dtype)], dim=1)
        expected = masked_logits(model, out.sequences, everything, schedule.layers, trace.kept, ids.shape[1])
    for step, logits in enumerate(out.logits):
        assert_close(logits, expected[:, ids.shape[1] - 1 + step])
    return out.cache


# --- dynamic ---


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "bloom", "gpt_oss"])
@pytest.mark.parametrize("lengths", [(40,), (9,), (40, 23)], ids=["long", "short", "padded"])
@pytest.mark.parametrize("kind", ["growing", "by the config"])
def test_the_caller_s_own_dynamic_cache_is_the_one_filled(tiny_model, family, lengths, kind):
    model = tiny_model(family, torch.float64)
    cache = DynamicCache() if kind == "growing" else DynamicCache(config=model.config)
    assert len(cache) == (0 if kind == "growing" else model.config.num_hidden_layers)
    assert generated(model, family, cache, *lengths) is cache
    survivors = schedule_for(family).layer_lengths(max(lengths), model.config.num_hidden_layers)
    windows = [kind == "by the config" and isinstance(layer.held, DynamicSlidingWindowLayer) for layer in cache.layers]
    for layer, count, sliding in zip(cache.layers, survivors, windows, strict=True):
        assert type(layer.held) is (DynamicSlidingWindowLayer if sliding else DynamicLayer)
        assert layer.get_seq_length() == count + 7
        assert layer.keys.shape[2] == (min(count + 7, WINDOW - 1) if sliding else count + 7)
    assert any(windows) == (kind == "by the config" and family in ("mistral_window", "gemma3", "gpt_oss"))


@pytest.mark.parametrize("name", [None, "dynamic", "hybrid"])
def test_dynamic_caches_by_name(tiny_model, name):
    # "hybrid" is what older checkpoints of sliding-window models say; `generate` takes it for no wish.
    model = tiny_model("gemma3", torch.float64)
    model.generation_config.cache_implementation = name
    cache = generated(model, "gemma3", None, 40, 23)
    assert type(cache) is DynamicCache
    assert {type(layer.held) for layer in cache.layers} == {DynamicLayer, DynamicSlidingWindowLayer}


# --- quantised ---

QUANTO = {"backend": "quanto", "q_group_size": 8, "residual_length": 4}
QUANTISED = {
    "quanto": (QUANTO, NO_QUANTO),
    # Quantised once: groups of a channel's tokens shift as tokens come, and values once rounded fall half-way then.
    "quanto by channel": ({**QUANTO, "axis_key": -1, "axis_value": -1, "residual_length": 100}, NO_QUANTO),
    "quanto of 2 bits": ({**QUANTO, "nbits": 2, "residual_length": 3}, NO_QUANTO),
    "quanto in small groups": ({**QUANTO, "q_group_size": 4, "residual_length": 1}, NO_QUANTO),
    "fp8": ({"backend": "fp8"}, ()),
    "hqq": ({"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 16}, NO_HQQ),
}


def quantised_reference(model, schedule, kept, sequences, columns, config):
    """Logits [batch, new tokens, vocabulary] of a prompt whose survivors were quantised, decoded token by token.

    The unpruned model prefills with removed keys hidden; each layer's survivors then go into a quantised layer of
    transformers, as does every later token; the layers attend to all that theirs holds.
    """
    rows = sequences.shape[0]
    everything = torch.ones_like(sequences)
    held = [torch.arange(columns).expand(rows, columns)] * len(decoder_layers(model))
    for survivors, start in zip(kept, schedule.layers, strict=True):
        held[start:] = [survivors] * (len(held) - start)
    masks = visible_keys(model, everything[:, :columns], schedule.layers, kept, columns)
    whole = DynamicCache()
    with rewritten(model, lambda layer, _: {"attention_mask": additive(masks[layer], model.dtype)}):
        logits = [model(sequences[:, :columns], cache=whole, use_cache=True).logits[:, -1]]
    quantised = QuantizedCache(config=model.config, **config)
    for layer, full, positions in zip(quantised.layers, whole.layers, held, strict=True):
        index = positions[:, None, :, None].expand(-1, full.keys.shape[1], -1, full.keys.shape[3])
        layer.update(full.keys.gather(2, index), full.values.gather(2, index))

    def seen(layer, given):
        keys = held[layer].shape[1] + column - columns + 1
        changed = {"attention_mask": additive(torch.ones(rows, 1, keys, dtype=torch.bool), model.dtype)}
        if "alibi" in given:
            later = torch.arange(columns, column + 1).expand(rows, -1)
            positions = torch.cat([held[layer], later], dim=1)[:, None]
            slopes = given["alibi"].unflatten(0, (rows, -1))[:, :, 0]  # [rows, heads, columns]
            changed["alibi"] = slopes.gather(2, positions.expand(-1, slopes.shape[1], -1)).flatten(0, 1)[:, None]
        return changed

    for column in range(columns, sequences.shape[1] - 1):
        place = {} if "position_ids" not in inspect.signature(model.forward).parameters else {
            "position_ids": torch.full((rows, 1), column)
        }  # fmt: skip
        with rewritten(model, seen):
            logits.append(
                model(sequences[:, column : column + 1], cache=quantised, use_cache=True, **place).logits[:, 0]
            )
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    ("name", "family", "rows"),
    [
        pytest.param(name, family, rows, marks=mark)
        for name, (_, mark) in QUANTISED.items()
        for family, rows in (("llama", 1), ("llama", 2), ("bloom", 1), ("bloom", 2))
        if name != "hqq" or (family, rows) == ("llama", 1)  # one skip where it is not installed
    ],
)
def test_a_quantised_cache_quantises_survivors_only(tiny_model, name, family, rows):
    model = tiny_model(family, torch.float64)
    config, _ = QUANTISED[name]
    ids, _ = prompt(*[40] * rows)
    schedule = schedule_for(family)
    with float64():
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            cache = QuantizedCache(config=model.config, **config)
            out = model.generate(ids, cache=cache, max_new_tokens=12, **SETTINGS)
        expected = quantised_reference(model, schedule, trace.kept, out.sequences, 40, config)
        exact = masked_logits(model, out.sequences, torch.ones_like(out.sequences), schedule.layers, trace.kept, 40)
    assert out.cache is cache
    assert [layer.get_seq_length() for layer in cache.layers] == [51, 35, 35, 23]
    for step, logits in enumerate(out.logits):
        assert_close(logits, expected[:, step])
    lossy = (torch.stack(out.logits, dim=1) - exact[:, 39:-1]).abs().amax((0, 2))
    assert lossy[0] <= 1e-9  # the prompt itself was attended to as it is
    assert lossy[1:].min() > 1e-4


@NO_QUANTO
def test_a_quantised_cache_by_name_with_beams_and_turns(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    settings = {"cache_implementation": "quantized", "cache_config": QUANTO, "max_new_tokens": 6, **SETTINGS}
    with float64(), TokenPruner(schedule_for("llama"), scorers.Random(4))(model):
        alone = model.generate(ids, attention_mask=real, **settings)
        again = model.generate(ids, attention_mask=real, **settings)
        beams = model.generate(ids, attention_mask=real, **{**settings, "num_beams": 3, "output_scores": True})
        whole = torch.cat([alone.sequences, torch.randint(3, 128, (2, 3))], dim=1)
        everything = torch.cat([real, torch.ones(2, 9, dtype=real.dtype)], dim=1)
        turn = model.generate(whole, attention_mask=everything, cache=alone.cache, max_new_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(alone.logits, again.logits, strict=True))
    assert all(layer.held.residual_length == 4 for layer in again.cache.layers)
    assert beams.sequences.shape == (2, 46)
    assert turn.shape == (2, 52)
    assert [layer.get_seq_length() for layer in alone.cache.layers] == [51, 35, 35, 23]


def test_what_a_quantised_cache_cannot_do_is_refused(tiny_model, tmp_path):
    model = tiny_model()
    ids, _ = prompt(40)
    cache = QuantizedCache(backend="fp8", config=model.config)
    with torch.no_grad(), TokenPruner(schedule_for("llama"), scorers.Random(4))(model):
        model(ids, cache=cache)
        model(ids[:, :3], cache=cache)
        with pytest.raises(ValueError, match=r"crop\(-2\): a Fp8QuantizedLayer cannot give tokens back"):
            cache.crop(-2)
        with pytest.raises(ValueError, match="layer 0 is a Fp8QuantizedLayer: dynamic and sliding layers are saved"):
            save_cache(cache, tmp_path / "a", model)
        assert [layer.get_seq_length() for layer in cache.layers] == [43, 27, 27, 15]
        lookup = QuantizedCache(backend="fp8", config=model.config)
        with pytest.raises(ValueError, match="cropped"):
            model.generate(ids, cache=lookup, prompt_lookup_num_tokens=3, max_new_tokens=4)
    words = "LastQuery reads the keys of the layer before, and a Fp8QuantizedLayer"
    with TokenPruner(schedule_for("llama"), scorers.LastQuery())(model), pytest.raises(ValueError, match=words):
        model(ids, cache=QuantizedCache(backend="fp8", config=model.config))


# --- offloaded ---


def test_a_layer_goes_to_the_cpu_and_comes_back(tiny_model):
    model = tiny_model("gemma3", torch.float64)
    ids, _ = prompt(40)
    new = torch.randint(3, 128, (1, 3))
    schedule = schedule_for("gemma3")
    with float64(), torch.no_grad():
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            cache = model(ids).cache
            for layer in cache.layers:
                keys, values = layer.keys, layer.values
                layer.offload()
                assert layer.keys.device.type == "cpu"
                layer.held.device = torch.device("meta")  # where it would be brought back to
                layer.prefetch()
                assert layer.keys.is_meta
                assert layer.values.is_meta
                with pytest.raises(NotImplementedError, match="no data"):  # of a tensor that has none to bring
                    layer.offload()
                layer.held.keys, layer.held.values, layer.held.device = keys, values, torch.device("cpu")
                layer.prefetch()
                assert layer.keys is keys
            found = model(new, cache=cache).logits
        whole = torch.cat([ids, new], dim=1)
        expected = masked_logits(model, whole, torch.ones_like(whole), schedule.layers, trace.kept, 40)
    assert_close(found, expected[:, 40:])


@NO_CUDA
def test_an_offloaded_cache(tiny_model):
    for family in ("llama", "gemma3", "bloom"):
        model = tiny_model(family, torch.float64).to("cuda")
        ids, real = (part.to("cuda") for part in prompt(40, 23))
        with TokenPruner(schedule_for(family), scorers.Random(4))(model):
            plain = model.generate(ids, attention_mask=real, max_new_tokens=8, **SETTINGS)
            offloaded = model.generate(
                ids, attention_mask=real, max_new_tokens=8, cache_implementation="offloaded", **SETTINGS
            )
        for a, b in zip(plain.logits, offloaded.logits, strict=True):
            assert_close(a, b)  # keys that have travelled lie otherwise in memory, and kernels add in another order
        assert offloaded.cache.layers[1].keys.device.type == "cpu"
        assert isinstance(offloaded.cache.layers[1], PrunedLayer)


# --- refused ---


@pytest.fixture
def hooks():
    with contextlib.ExitStack() as stack:
        yield stack


def static(config):
    return StaticCache(config=config, max_cache_len=64)


OTHERS = {
    "static": ("llama", static, "layer 0 of StaticCache is a StaticLayer"),
    "static and sliding": ("gemma3", static, "layer 0 of StaticCache is a StaticSlidingWindowLayer"),
    "growing": ("llama", lambda _: Cache(layer_class_to_replicate=LinearAttentionLayer), "is a LinearAttentionLayer"),
    "encoder-decoder": ("llama", lambda _: EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
    "keys and values": ("llama", lambda _: ((torch.zeros(1), torch.zeros(1)),), "a tuple is not supported"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_other_caches_are_refused_before_anything_ran(tiny_model, hooks, name, call):
    family, make, words = OTHERS[name]
    model = tiny_model(family)
    ids, _ = prompt(40)
    cache = make(model.config)
    ran = []
    decoder_layers(model)[0].register_forward_pre_hook(lambda *args: ran.append(args))
    error = TypeError
    if call == "generate" and type(cache) is tuple:
        error, words = ValueError, "Passing a tuple"  # transformers' own refusal
    trace = hooks.enter_context(TokenPruner(schedule_for(family), scorers.Random(4))(model))
    with pytest.raises(error, match=words), torch.no_grad():
        model(ids, cache=cache) if call == "forward" else model.generate(ids, cache=cache, max_new_tokens=2)
    assert not ran
    assert not trace.kept
    if isinstance(cache, Cache):
        assert int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("name", [*ALL_CACHE_IMPLEMENTATIONS, "paged"])
def test_every_name_of_a_cache_is_right_or_refused(tiny_model, name):
    model = tiny_model()
    ids, _ = prompt(40)
    right = {"dynamic": (), "hybrid": (), "quantized": NO_QUANTO.args, "offloaded": NO_CUDA.args}
    with TokenPruner(schedule_for("llama"), scorers.Random(4))(model) as trace:
        if name not in right:
            for given in ({"cache_implementation": name}, {"generation_config": with_cache(name)}):
                with pytest.raises(ValueError, match=f"cache_implementation='{name}' is not supported under a pruner"):
                    model.generate(ids, max_new_tokens=2, **given)
            assert not trace.kept
        elif not any(right[name]):
            model.generate(ids, max_new_tokens=2, cache_implementation=name)
            assert trace.kept


def with_cache(name):
    config = GenerationConfig()
    config.cache_implementation = name
    return config
