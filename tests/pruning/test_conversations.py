"""Going on with a pruned prompt: turns, copies, files, cuts, and many questions to one document.

The references keep keys by hand (`stepwise_logits`) or hide removed ones (`masked_logits`), at every new token.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import struct

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from transformers import DynamicCache

from sdtp import TokenPruner, scorers
from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.cache_store import load_cache, save_cache
from tests.conftest import FAMILIES, WINDOW
from tests.pruning.reference import additive, masked_logits, rewritten, stepwise_logits, visible_keys
from tests.pruning.tiny import assert_close, float64, positions_of, prompt, schedule_for

SETTINGS = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
WITHOUT_SDPA = ["bloom", "gpt_oss"]
# Full layers first: they are reached before the sliding ones.
FULL_FIRST = {"layer_types": ["full_attention", "sliding_attention"] * 3}


def pruned(model, family, ids, real=None, seed=4):
    """The pruned cache of a prompt, and the trace's survivors."""
    inputs = {} if real is None else {"attention_mask": real, **positions_of(model, real)}
    with TokenPruner(schedule_for(family), scorers.Random(seed))(model) as trace:
        cache = model(ids, use_cache=True, **inputs).cache
        return cache, list(trace.kept)


def inside(model, family):
    """A context to continue a cache in; the scorer is of no account there."""
    return TokenPruner(schedule_for(family), scorers.Random(0))(model)


def lengths_of(cache):
    return [layer.get_seq_length() for layer in cache.layers]


# --- turns ---


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "bloom"])
@pytest.mark.parametrize("lengths", [(40,), (9,), (40, 23)], ids=["long", "short", "padded"])
@pytest.mark.parametrize("handed", ["everything", "what is new"])
def test_turns_of_generate_on_one_cache(tiny_model, family, lengths, handed):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(*lengths)
    turns = [prompt(*(6, 4)[: len(lengths)]), prompt(*(2, 5)[: len(lengths)])]
    cache, logits, starts = None, [], []
    whole, everything = ids[:, :0], real[:, :0]
    with float64(), torch.no_grad():
        with TokenPruner(schedule_for(family), scorers.Random(4))(model) as trace:
            for turn, turn_real in [(ids, real), *turns]:
                whole = torch.cat([whole, turn], dim=1)
                everything = torch.cat([everything, turn_real], dim=1)
                given = whole if handed == "everything" or cache is None else whole[:, cache.get_seq_length() :]
                out = model.generate(given, attention_mask=everything, cache=cache, max_new_tokens=4, **SETTINGS)
                starts.append(whole.shape[1])
                logits.append(out.logits)
                whole = torch.cat([whole, out.sequences[:, given.shape[1] :]], dim=1)
                everything = torch.cat([everything, torch.ones(len(lengths), 4, dtype=real.dtype)], dim=1)
                cache = out.cache
        assert [kept.shape[1] for kept in trace.kept] == schedule_for(family).surviving(max(lengths))
        expected = stepwise_logits(model, whole, everything, schedule_for(family).layers, trace.kept, ids.shape[1])
    assert cache.get_seq_length() == whole.shape[1] - 1
    for start, steps in zip(starts, logits, strict=True):
        for step, found in enumerate(steps):
            assert_close(found, expected[:, start - ids.shape[1] + step])


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one row", "padded"])
def test_a_later_mask_may_hide_what_an_earlier_one_showed(tiny_model, family, tokens, lengths):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(*lengths)
    turn, new = torch.randint(3, 128, (len(lengths), 4)), torch.randint(3, 128, (len(lengths), tokens))
    whole = torch.cat([ids, turn, new], dim=1)
    everything = torch.cat([real, torch.ones_like(turn), torch.ones_like(new)], dim=1)
    positions = (everything.cumsum(1) - 1).clamp_min(0)
    later = everything.clone()
    later[:, [30, 35, 39, 41]] = 0
    with float64(), torch.no_grad():
        cache, kept = pruned(model, family, ids, real)
        with inside(model, family):
            model(turn, attention_mask=everything[:, :44], position_ids=positions[:, 40:44], cache=cache)
            found = model(new, attention_mask=later, position_ids=positions[:, 44:], cache=cache).logits
        masks = visible_keys(model, everything, schedule_for(family).layers, kept, 40)
        for mask in masks:
            mask[:, 44:] &= later[:, None].bool()
        with rewritten(model, lambda layer, _: {"attention_mask": additive(masks[layer], model.dtype)}):
            logits = model(whole, attention_mask=everything, position_ids=positions, use_cache=False).logits
        usual = masked_logits(model, whole, everything, schedule_for(family).layers, kept, 40)
    assert_close(found, logits[:, 44:])
    assert (usual - logits)[:, 44:].abs().amax((1, 2)).min() > 1e-3


# --- outside the context ---


def claims(family, attention, length):
    """Whether a lone token after `length` columns is right outside: it needs nothing that layers would share."""
    windowed = family in ("mistral_window", "phi3_window", "gemma3", "gpt_oss")
    return attention == "sdpa" and family not in WITHOUT_SDPA and not (windowed and length + 1 >= WINDOW)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("attention", "length"), [("sdpa", 40), ("sdpa", WINDOW - 1), ("sdpa", WINDOW - 2), ("eager", 9)]
)
def test_outside_the_context_one_token_is_right_or_refused(tiny_model, family, attention, length):
    model = tiny_model(family, torch.float64, attention)
    ids, _ = prompt(length)
    new = torch.randint(3, 128, (1, 3))
    whole = torch.cat([ids, new], dim=1)
    with float64(), torch.no_grad():
        cache, kept = pruned(model, family, ids)
        expected = masked_logits(model, whole, torch.ones_like(whole), schedule_for(family).layers, kept, length)
        held = lengths_of(cache)
        with pytest.raises(RuntimeError, match=r"got 2 tokens for 1 rows outside .* inside `with pruner\(model\):`"):
            model(new[:, :2], cache=cache)
        assert lengths_of(cache) == held
        start = 0
        if claims(family, attention, length):
            found = model(new[:, :1], cache=cache).logits
            assert_close(found, expected[:, length : length + 1])
            start = 1
        else:
            with pytest.raises(RuntimeError, match=r"continue it inside `with pruner\(model\):`"):
                model(new[:, :1], cache=cache)
            assert lengths_of(cache) == held
        with inside(model, family):  # what the refusal advises is right
            found = model(new[:, start:], cache=cache).logits
    assert_close(found, expected[:, length + start :])


def test_outside_the_context_generate_goes_on_token_by_token(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, _ = prompt(40)
    with float64(), torch.no_grad():
        cache, kept = pruned(model, "llama", ids)
        whole = torch.cat([ids, torch.tensor([[7]])], dim=1)
        out = model.generate(whole, cache=cache, max_new_tokens=4, **SETTINGS)
        everything = torch.ones_like(out.sequences)
        expected = masked_logits(model, out.sequences, everything, schedule_for("llama").layers, kept, 40)
        held = lengths_of(cache)
        with pytest.raises(RuntimeError, match="with pruner"):
            model.generate(torch.cat([out.sequences, whole[:, :3]], dim=1), cache=cache, max_new_tokens=1)
        assert lengths_of(cache) == held
    for step, logits in enumerate(out.logits):
        assert_close(logits, expected[:, 40 + step])


def test_outside_the_context_padding_is_refused(tiny_model):
    model = tiny_model()
    ids, real = prompt(40, 23)
    longer = torch.cat([real, real[:, -1:]], dim=1)
    with torch.no_grad():
        caches = [pruned(model, "llama", ids, real)[0], pruned(model, "llama", ids)[0]]
        with inside(model, "llama"):  # an unpadded prompt and a padded turn
            turn_real = torch.cat([torch.ones_like(real), torch.tensor([[1, 1], [0, 1]])], dim=1)
            model(ids[:, :2], attention_mask=turn_real, cache=caches[1])
        for cache, mask in zip(caches, (longer, torch.cat([turn_real, real[:, -1:]], dim=1)), strict=True):
            held = lengths_of(cache)
            with pytest.raises(RuntimeError, match="got 1 tokens for 2 rows"):
                model(ids[:, :1], attention_mask=mask, cache=cache)
            assert lengths_of(cache) == held


def test_a_window_of_a_later_layer_is_minded_before_the_first_has_changed(tiny_model):
    model = tiny_model("gemma3", torch.float64, **FULL_FIRST)
    ids, _ = prompt(WINDOW - 2)
    new = torch.randint(3, 128, (1, 2))
    whole = torch.cat([ids, new], dim=1)
    with float64(), torch.no_grad():
        cache, kept = pruned(model, "gemma3", ids)
        first = model(new[:, :1], cache=cache).logits
        held = lengths_of(cache)
        with pytest.raises(RuntimeError, match="with pruner"):
            model(new[:, 1:], cache=cache)
        assert lengths_of(cache) == held
        with inside(model, "gemma3"):
            second = model(new[:, 1:], cache=cache).logits
        expected = masked_logits(model, whole, torch.ones_like(whole), schedule_for("gemma3").layers, kept, WINDOW - 2)
    assert_close(torch.cat([first, second], dim=1), expected[:, -2:])


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("when", ["prefill", "turn"])
@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("make", [DynamicCache, lambda: None], ids=["growing", "the model's own"])
def test_a_forward_pass_that_was_interrupted_leaves_no_cache_to_go_on_with(tiny_model, when, layer, make):
    model = tiny_model()
    ids, _ = prompt(40)
    cache = make() if make() is not None else DynamicCache(config=model.config)

    def interrupt(module, args, output):
        raise InterruptionError

    with torch.no_grad(), inside(model, "llama"):
        if when == "turn":
            model(ids, cache=cache)
        handle = model.model.layers[layer].register_forward_hook(interrupt)
        with pytest.raises(InterruptionError):
            model(ids[:, :1] if when == "turn" else ids, cache=cache)
        handle.remove()
        if layer == 3 and when == "turn":  # every layer has the token: nothing is wrong with the cache
            model(ids[:, :1], cache=cache)
            return
        if layer == 3:
            return
        with pytest.raises(RuntimeError, match="a forward pass on this cache was interrupted"):
            model(ids[:, :1], cache=cache)
    with torch.no_grad(), pytest.raises(RuntimeError, match="a forward pass on this cache was interrupted"):
        model(ids[:, :1], cache=cache)


# --- copies and files ---


def continued(model, family, cache, new, real=None):
    """Logits of tokens given to the cache three ways: several at once, one, and generated ones."""
    rows, columns = new.shape[0], cache.get_seq_length()
    everything = torch.ones(rows, columns + 4, dtype=torch.long)
    if real is not None:
        everything[:, : real.shape[1]] = real
    with torch.no_grad(), inside(model, family):
        found = []
        for start, end in ((0, 3), (3, 4)):
            mask = everything[:, : columns + end]
            inputs = {name: value[:, columns + start :] for name, value in positions_of(model, mask).items()}
            found.append(model(new[:, start:end], attention_mask=mask, cache=cache, **inputs).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_a_copy_and_its_original_go_on_apart(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids, _ = prompt(40)
    one, other = torch.randint(3, 128, (2, 1, 4))
    with float64():
        with torch.no_grad():
            cache, kept = pruned(model, family, ids)
        copied = copy.deepcopy(cache)
        found = [continued(model, family, copied, one), continued(model, family, cache, other)]
        for new, logits in zip((one, other), found, strict=True):
            whole = torch.cat([ids, new], dim=1)
            expected = masked_logits(model, whole, torch.ones_like(whole), schedule_for(family).layers, kept, 40)
            assert_close(logits, expected[:, 40:])
    assert copied.layers[0].later == copied.layers[1:]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "bloom", "opt"])
@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one row", "padded"])
def test_a_cache_from_a_file_goes_on_bit_for_bit(tiny_model, tmp_path, family, lengths):
    model = tiny_model(family, torch.bfloat16 if family == "mistral_window" else torch.float32)
    ids, real = prompt(*lengths)
    new = torch.randint(3, 128, (len(lengths), 4))
    path = tmp_path / "document.safetensors"
    with torch.no_grad():
        cache, _ = pruned(model, family, ids, real if len(lengths) > 1 else None)
    given = real if len(lengths) > 1 else None
    continued(model, family, cache, torch.randint(3, 128, (len(lengths), 4)), given)  # a turn, not yet given columns
    if given is not None:
        given = torch.cat([given, torch.ones(2, 4, dtype=given.dtype)], dim=1)
    save_cache(cache, path, model)
    loaded = load_cache(path, model)
    assert type(loaded) is DynamicCache
    assert lengths_of(loaded) == lengths_of(cache)
    assert loaded.layers[0].later == loaded.layers[1:]
    assert torch.equal(continued(model, family, loaded, new, given), continued(model, family, cache, new, given))
    for found, layer in zip(loaded.layers, cache.layers, strict=True):
        assert type(found.held) is type(layer.held)
        assert torch.equal(found.keys, layer.keys)
        assert torch.equal(found.positions, layer.positions)
        assert torch.equal(found.columns, layer.columns)
        for name in ("stage", "seen", "prompt_slots", "padded", "window", "maskless"):
            assert getattr(found, name) == getattr(layer, name)
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"sdtp_kv_cache"}
        assert json.loads(file.metadata()["sdtp_kv_cache"])["seen"] == 44
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_a_cache_from_a_file_outside_the_context_cut_and_recorded(tiny_model, tmp_path):
    model = tiny_model("gemma3", torch.float64)
    ids, _ = prompt(40)
    new = torch.randint(3, 128, (1, 4))
    with torch.no_grad():
        cache, _ = pruned(model, "gemma3", ids)
    cache.activate_past_recording()
    first = continued(model, "gemma3", cache, new)
    save_cache(cache, tmp_path / "a", model)
    loaded = load_cache(tmp_path / "a", model)
    with pytest.raises(RuntimeError, match="with pruner"), torch.no_grad():
        model(new[:, :1], cache=loaded)
    with pytest.raises(ValueError, match="reaches into the pruned prompt"):
        loaded.crop(-5)
    loaded.crop(-4)
    assert torch.equal(continued(model, "gemma3", loaded, new), first)


def test_a_cache_from_a_file_goes_where_an_offloaded_model_runs(tiny_model, tmp_path):
    model = tiny_model()
    new = torch.randint(3, 128, (1, 4))
    with torch.no_grad():
        cache, _ = pruned(model, "llama", prompt(40)[0])
    expected = continued(model, "llama", copy.deepcopy(cache), new)
    model = cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    save_cache(cache, tmp_path / "a", model)
    assert torch.equal(continued(model, "llama", load_cache(tmp_path / "a", model), new), expected)


def test_a_cache_of_a_prompt_that_lost_nothing_is_saved_too(tiny_model, tmp_path):
    model = tiny_model("gemma3")
    ids, _ = prompt(40)
    with torch.no_grad():
        cache = model(ids).cache
        save_cache(cache, tmp_path / "a", model)
        loaded = load_cache(tmp_path / "a", model)
        assert not any(isinstance(layer, PrunedLayer) for layer in loaded.layers)
        assert torch.equal(model(ids[:, :3], cache=loaded).logits, model(ids[:, :3], cache=cache).logits)


def header_of(path):
    """The JSON header of a safetensors file, and the rest of it."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def flip(path, index):
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def rewrite(path, change, more=""):
    """Put another header of the cache in place of the file's."""
    header, rest = header_of(path)
    contents = json.loads(header["__metadata__"]["sdtp_kv_cache"])
    header["__metadata__"]["sdtp_kv_cache"] = json.dumps(change(contents)) + more
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def without(contents, key):
    return {name: value for name, value in contents.items() if name != key}


def with_layer(contents, index, **changes):
    layers = [{**layer, **(changes if i == index else {})} for i, layer in enumerate(contents["layers"])]
    return {**contents, "layers": layers}


DAMAGE = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-10]), "is not a whole safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
    "of something else": (lambda path: path.write_text("{}"), "is not a whole safetensors file"),
    "other tensors": (
        lambda path: safetensors.torch.save_file({"a": torch.zeros(1)}, path), "no KV cache that save_cache wrote"
    ),
    "one bit": (lambda path: flip(path, -9), "its tensors are not those that were written"),
    "no JSON": (lambda path: rewrite(path, lambda contents: contents, '"'), "no JSON"),
    "another format": (lambda path: rewrite(path, lambda c: {**c, "format": 2}), "format 2: 1 is accepted"),
    "a list": (lambda path: rewrite(path, lambda c: [c]), "is accepted"),
    "a missing key": (lambda path: rewrite(path, lambda c: without(c, "seen")), "header has keys"),
    "a wrong type": (lambda path: rewrite(path, lambda c: {**c, "seen": "40"}), "header.seen is '40'"),
    "a layer too many": (
        lambda path: rewrite(path, lambda c: {**c, "layers": [*c["layers"], c["layers"][3]]}), "too many or too few"
    ),
    "a wrong stage": (lambda path: rewrite(path, lambda c: with_layer(c, 3, stage=5)), "stages"),
    "no stages": (lambda path: rewrite(path, lambda c: {**c, "stages": []}), "stages"),
    "a wrong length": (lambda path: rewrite(path, lambda c: with_layer(c, 3, tokens=9)), "tensors of layer 3"),
    "a window": (lambda path: rewrite(path, lambda c: with_layer(c, 2, window=50)), "layer 2 has a window of 50"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_in_one_error(tiny_model, tmp_path, damage):
    model = tiny_model()
    path = tmp_path / "document"
    with torch.no_grad():
        save_cache(pruned(model, "llama", prompt(40)[0])[0], path, model)
    before = path.read_bytes()
    change, words = DAMAGE[damage]
    change(path)
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{words}"):
        load_cache(path, model)


def test_files_that_are_not_there_and_caches_of_another_model_are_refused(tiny_model, tmp_path):
    model = tiny_model()
    path = tmp_path / "document"
    with torch.no_grad():
        save_cache(pruned(model, "llama", prompt(40)[0])[0], path, model)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "other", model)
    with pytest.raises(ValueError, match="is a folder"):
        load_cache(tmp_path, model)
    for other, words in (
        (tiny_model("qwen2"), "model_type is qwen2, not llama"),
        (tiny_model(num_hidden_layers=3), "num_layers is 3, not 4"),
        (tiny_model(dtype=torch.float64), "it is of torch.float32, the model of torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"{path}.*{words}"):
            load_cache(path, other)
    with torch.no_grad():
        smaller = tiny_model(num_hidden_layers=3)
        schedule = dataclasses.replace(schedule_for("llama"), layers=(1, 2))
        with TokenPruner(schedule, scorers.Random())(smaller):
            cache = smaller(prompt(40)[0]).cache
        with pytest.raises(ValueError, match="the cache has 3 layers, the model 4"):
            save_cache(cache, path, model)
    save_cache(cache, tmp_path / "smaller", smaller)
    maker = json.loads(header_of(path)[0]["__metadata__"]["sdtp_kv_cache"])["model"]
    rewrite(tmp_path / "smaller", lambda contents: {**contents, "model": maker})
    with pytest.raises(ValueError, match="it has 3 layers, the model 4"):
        load_cache(tmp_path / "smaller", model)
    model.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(ValueError, match="another model made it: its weights"):
        load_cache(path, model)


def test_what_is_not_saved_leaves_the_file_that_was_there(tiny_model, tmp_path, monkeypatch):
    model = tiny_model()
    path = tmp_path / "document"
    ids, _ = prompt(40)
    with torch.no_grad():
        cache, _ = pruned(model, "llama", ids)
        save_cache(cache, path, model)
        before = path.read_bytes()
        with pytest.raises(ValueError, match="holds no tokens"):
            save_cache(DynamicCache(config=model.config), path, model)
        with pytest.raises(TypeError, match="a list is not supported"):
            save_cache([], path, model)
        with torch.autocast("cpu", torch.bfloat16):
            other, _ = pruned(tiny_model("bloom"), "bloom", ids)
        with pytest.raises(
            ValueError, match=r"layer 0 is of torch.bfloat16, the model of torch.float32: what autocast"
        ):
            save_cache(other, path, tiny_model("bloom"))
        with inside(model, "llama"):
            model(ids[:, :2], cache=cache)
        # A full disk, as the new file is about to take the old one's place.
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            save_cache(cache, path, model)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


# --- cuts ---


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "bloom", "gpt_oss"])
@pytest.mark.parametrize("lengths", [(40,), (9,), (40, 23)], ids=["long", "short", "padded"])
@pytest.mark.parametrize("removed", [1, 3, 5])
def test_cut_tokens_are_as_if_they_had_never_come(tiny_model, family, lengths, removed):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(*lengths)
    wrong = torch.randint(3, 128, (len(lengths), 5))
    right = torch.cat([wrong[:, : 5 - removed], torch.randint(3, 128, (len(lengths), 6))], dim=1)
    whole = torch.cat([ids, right], dim=1)
    everything = torch.cat([real, torch.ones_like(right)], dim=1)
    start, columns = 5 - removed, ids.shape[1]
    positions = positions_of(model, everything)

    def feed(tokens, start, cache):
        end = columns + start + tokens.shape[1]
        inputs = {name: value[:, columns + start : end] for name, value in positions.items()}
        return model(tokens, attention_mask=everything[:, :end], cache=cache, **inputs).logits

    with float64(), torch.no_grad():
        cache, kept = pruned(model, family, ids, real)
        cache.activate_past_recording()
        with inside(model, family):
            feed(wrong[:, :2], 0, cache)
            feed(wrong[:, 2:], 2, cache)
            cache.crop(-removed)
            found = [feed(right[:, start : start + 4], start, cache), feed(right[:, start + 4 :], start + 4, cache)]
        expected = masked_logits(model, whole, everything, schedule_for(family).layers, kept, columns)
    assert_close(torch.cat(found, dim=1), expected[:, columns + start :])


@pytest.mark.parametrize("layers", [{}, FULL_FIRST], ids=["sliding layer first", "full layer first"])
def test_cuts_that_cannot_be_made_change_no_layer(tiny_model, layers):
    model = tiny_model("gemma3", torch.float64, **layers)
    ids, _ = prompt(40)
    new = torch.randint(3, 128, (1, 6))
    with float64(), torch.no_grad():
        cache, kept = pruned(model, "gemma3", ids)
        with inside(model, "gemma3"):
            model(new[:, :2], cache=cache)
            held = lengths_of(cache)
            refused = [(-1, "no longer holds the tokens"), (-3, "the 2 tokens after it"), (1, "negative, or 0")]
            for number, words in refused:
                with pytest.raises(ValueError, match=words):
                    cache.crop(number)
                assert lengths_of(cache) == held
            cache.activate_past_recording()
            model(new[:, 2:4], cache=cache)
            held = lengths_of(cache)
            with pytest.raises(ValueError, match="no longer holds the tokens"):
                cache.crop(-3)  # one more than was recorded
            assert lengths_of(cache) == held
            cache.crop(-2)
            found = model(new[:, 2:], cache=cache).logits
        whole = torch.cat([ids, new], dim=1)
        expected = masked_logits(model, whole, torch.ones_like(whole), schedule_for("gemma3").layers, kept, 40)
    assert_close(found, expected[:, 42:])
    with pytest.raises(RuntimeError, match="cannot be reset"):
        cache.reset()


def test_a_stop_that_is_read_one_step_late_takes_that_step_back(tiny_model):
    # As `generate` does on devices that are slow to read: it records, cuts to the window after each step, takes the
    # last step back, and stops recording.
    model = tiny_model("gemma3", torch.float64)
    ids, _ = prompt(40)
    new = torch.randint(3, 128, (1, 4))
    with torch.no_grad():
        cache, _ = pruned(model, "gemma3", ids)
        undisturbed = copy.deepcopy(cache)
        with inside(model, "gemma3"):
            cache.activate_past_recording()
            for token in new[:, :3].split(1, dim=1):
                model(token, cache=cache)
                cache.crop(0)
            held = [layer.keys.shape[-2] for layer in cache.layers if layer.is_sliding]
            model(new[:, 3:], cache=cache)
            cache.crop(-1)
            for layer in cache.layers:
                layer.record_past = False
            model(new[:, :3], cache=undisturbed)
            expected = model(new[:, 3:], cache=undisturbed).logits
            found = model(new[:, 3:], cache=cache).logits
    assert held == [WINDOW - 1] * 3
    assert not any(layer.record_past for layer in cache.layers)
    assert [layer.keys.shape[-2] for layer in cache.layers if layer.is_sliding] == held
    assert_close(found, expected)


# --- one document, many questions ---


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one row", "padded"])
def test_a_question_gives_what_it_gives_alone(tiny_model, family, lengths):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(*lengths)
    pruner = TokenPruner(schedule_for(family), scorers.HiddenNorm())
    questions = [prompt(*numbers[: len(lengths)]) for numbers in ((6, 3), (4, 5))]
    protect = torch.zeros_like(real, dtype=torch.bool)
    protect[:, 30] = True
    inputs = {} if len(lengths) == 1 else {"attention_mask": real}

    def ask(cache, question, question_real):
        whole = torch.cat([ids, question], dim=1)
        everything = torch.cat([real, question_real], dim=1)
        out = model.generate(whole, attention_mask=everything, cache=copy.deepcopy(cache), max_new_tokens=4, **SETTINGS)
        return out, torch.cat([everything, torch.ones(len(lengths), 4, dtype=real.dtype)], dim=1)

    with float64(), torch.no_grad():
        document, fresh = (pruner.cache_document(model, ids, protect=protect, **inputs) for _ in range(2))
        with pruner(model, protect=protect) as trace:
            model(ids, **inputs, **(positions_of(model, real) if inputs else {}))
        kept = list(trace.kept)
        held = lengths_of(document)
        assert held[-1] == schedule_for(family).surviving(40)[-1]
        with pruner(model):
            both = [ask(document, *question) for question in questions]
        with pruner(model):
            alone, _ = ask(fresh, *questions[1])
        assert lengths_of(document) == held
        for out, everything in both:
            expected = stepwise_logits(model, out.sequences, everything, schedule_for(family).layers, kept, 40)
            for step, logits in enumerate(out.logits):
                assert_close(logits, expected[:, -5 + step])
    for one, other in zip(both[1][0].logits, alone.logits, strict=True):
        assert torch.equal(one, other)
    for kept_at in kept:
        for row, n in enumerate(lengths):
            assert 30 - (40 - n) in kept_at[row].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams_over_a_document_that_was_cached_for_one_row_each(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(40, 23)
    question, question_real = prompt(3, 5)
    whole, everything = torch.cat([ids, question], dim=1), torch.cat([real, question_real], dim=1)
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "output_scores": True, **SETTINGS}
    with float64(), torch.no_grad():
        cache, kept = pruned(model, family, ids, real)
        cache.batch_repeat_interleave(3)
        with inside(model, family):
            out = model.generate(whole, attention_mask=everything, cache=cache, length_penalty=0.0, **settings)
        everything = torch.cat([everything.repeat_interleave(3, dim=0), torch.ones(6, 5, dtype=real.dtype)], dim=1)
        kept = [k.repeat_interleave(3, dim=0) for k in kept]
        expected = masked_logits(model, out.sequences, everything, schedule_for(family).layers, kept, 40)
    chosen = expected[:, 44:-1].log_softmax(-1).gather(2, out.sequences[:, 45:, None])[..., 0]
    assert_close(out.sequences_scores, chosen.sum(1))


def test_a_document_without_its_question_is_not_pruned_by_the_question(tiny_model):
    with pytest.raises(ValueError, match="LastQuery chooses tokens by the end of the prompt"):
        TokenPruner(schedule_for("llama"), scorers.LastQuery()).cache_document(tiny_model(), prompt(40)[0])


# --- wrong ways to go on ---


@pytest.mark.parametrize("made", ["with a config", "without one"])
def test_a_cache_that_a_failed_prefill_left_uneven_is_not_continued(tiny_model, made):
    class Broken:
        question_conditioned = False

        def score(self, view):
            raise ZeroDivisionError

    model = tiny_model()
    ids = torch.randint(3, 128, (1, 40))
    cache = DynamicCache(config=model.config) if made == "with a config" else DynamicCache()
    with TokenPruner(schedule_for("llama"), Broken())(model), torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(ids, cache=cache)
        with pytest.raises(RuntimeError, match="interrupted"):
            model(ids[:, :1], cache=cache)


def test_padded_rows_go_on_with_their_mask_or_not_at_all(tiny_model):
    model = tiny_model()
    ids = torch.randint(3, 128, (2, 40))
    real = torch.ones_like(ids)
    real[1, :9] = 0
    pruner = TokenPruner(schedule_for("llama"), scorers.HiddenNorm())
    cache = pruner.cache_document(model, ids, real)
    with pruner(model), torch.no_grad():
        with pytest.raises(ValueError, match="give the attention_mask of all tokens"):
            model(ids[:, :1], cache=cache)
        with pytest.raises(ValueError, match="the cache holds 2 rows and the model was called with 1"):
            model(ids[:1, :1], cache=cache)
        assert [layer.get_seq_length() for layer in cache.layers][:2] == [40, cache.layers[1].get_seq_length()]
        model(ids[:, :1], attention_mask=torch.cat([real, real[:, -1:]], 1), cache=cache)


def test_without_its_padded_row_a_cache_is_as_one_without_padding(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    question = torch.randint(3, 128, (1, 5))
    with float64(), torch.no_grad():
        cache, kept = pruned(model, "llama", ids, real)
        whole = torch.cat([ids[:1], question], dim=1)
        everything = torch.ones_like(whole)
        expected = masked_logits(model, whole, everything, schedule_for("llama").layers, [k[:1] for k in kept], 40)
        cache.batch_select_indices(torch.tensor([0]))
        with inside(model, "llama"):
            out = model.generate(whole, attention_mask=everything, cache=cache, max_new_tokens=1, **SETTINGS)
    assert_close(out.logits[0], expected[:, -1])


def test_candidates_beside_a_filled_cache_are_refused(tiny_model):
    """With them `generate` feeds the document again, for an unpruned model too."""
    model = tiny_model()
    ids, _ = prompt(40)
    pruner = TokenPruner(schedule_for("llama"), scorers.HiddenNorm())
    cache = pruner.cache_document(model, ids)
    held = lengths_of(cache)
    whole = torch.cat([ids, ids[:, 3:12]], dim=1)
    with pruner(model):
        for candidates in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model()}):
            with pytest.raises(
                ValueError, match=r"not supported under a pruner with a cache that holds tokens \(here 40\)"
            ):
                model.generate(whole, cache=cache, max_new_tokens=4, **candidates)
            assert lengths_of(cache) == held
            model.generate(ids, cache=DynamicCache(config=model.config), max_new_tokens=2, **candidates)  # an empty one


def test_a_question_without_its_document_is_refused(tiny_model):
    model = tiny_model()
    document, question = torch.randint(3, 128, (1, 40)), torch.randint(3, 128, (1, 7))
    pruner = TokenPruner(schedule_for("llama"), scorers.HiddenNorm())
    cache = pruner.cache_document(model, document)
    with pruner(model):
        with pytest.raises(ValueError, match="the cache holds 40 tokens and generate was given 7"):
            model.generate(question, cache=cache, max_new_tokens=2)
        assert model.generate(torch.cat([document, question], 1), cache=cache, max_new_tokens=2).shape[1] <= 49
