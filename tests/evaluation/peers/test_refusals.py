"""What a peer cannot do right it refuses, in a sentence that says why."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sdtp.evaluation.peers.budgets import fraction
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.fastkv import FastKV
from sdtp.evaluation.peers.gemfilter import GemFilter
from sdtp.evaluation.peers.h2o import H2O
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

HALF = fraction(0.5)
SNAP = Compression(SnapKV(6, 3), HALF)
GEM = GemFilter(2, HALF)
IDS = torch.arange(3, 43)[None]
TWO = IDS.repeat(2, 1)
PRUNER = TokenPruner(PruningSchedule((1, 3), (0.6, 0.3), sinks=2, min_local=3), scorers.Random(0))


@pytest.mark.parametrize(
    ("family", "error"),
    [
        ("mistral_window", "its layer 0 attends to the latest"),
        ("gemma3", "its layer 0 attends to the latest"),
        ("bloom", "ALiBi"),
        ("gpt_neox", "SnapKV reads attention as LastQuery does"),
        ("phi3", "it has no q_proj"),
        ("opt", "its positions are not rotary|it has no q_proj"),
        ("olmo2", "of queries is not over the 8 channels of one head"),
        ("smollm3", "the layer has no rotary positions"),
    ],
)
def test_models(tiny_model, family, error):
    with pytest.raises(TypeError, match=error), SNAP(tiny_model(family)):
        pass


def test_kernels_and_stacks(tiny_model):
    model = tiny_model()
    with pytest.raises(TypeError, match="LlamaModel has no language-model head"), SNAP(model.model):
        pass
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention 'flash_attention_2' is not supported by peers"), SNAP(model):
        pass


@pytest.mark.parametrize(
    ("peer", "error"),
    [
        (GemFilter(4, HALF), "layer is 4: the model has layers 0 to 3"),
        (GemFilter(-1, HALF), "layer is -1"),
        (FastKV(3, HALF, HALF), "layer is 3: 0 to 2 is accepted"),
        (FastKV(-1, HALF, HALF), "layer is -1"),
    ],
)
def test_layers_that_are_not_there(tiny_model, peer, error):
    with pytest.raises(ValueError, match=error), peer(tiny_model()):
        pass


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"input_ids": TWO}, r"shape \(2, 40\): a peer takes one row"),
        ({"input_ids": IDS[:, :0]}, r"shape \(1, 0\)"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "from input_ids"),
        ({"input_ids": IDS, "attention_mask": (IDS > 3).long()}, "attention_mask hides tokens"),
        ({"input_ids": IDS, "position_ids": IDS}, "position_ids other than 0 to N-1"),
        ({"input_ids": IDS, "use_cache": False}, "use_cache=False"),
        ({"input_ids": IDS, "labels": IDS}, "labels is a tensor"),
        ({"input_ids": IDS, "logits_to_keep": 2}, "logits_to_keep is 2"),
        ({"input_ids": IDS, "return_dict": False}, "return_dict is False"),
        ({"input_ids": IDS, "output_attentions": True}, "output_attentions=True"),
    ],
)
@pytest.mark.parametrize("peer", [SNAP, GEM], ids=["compression", "gemfilter"])
def test_forwards(tiny_model, peer, kwargs, error):
    model = tiny_model()
    with pytest.raises(ValueError, match=error), peer(model):
        model(**kwargs)


def test_caches(tiny_model):
    model = tiny_model()
    with pytest.raises(TypeError, match="StaticCache is not supported by a peer"), SNAP(model):
        model(input_ids=IDS, cache=StaticCache(model.config, max_cache_len=64))


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"inputs": TWO}, "one row"),
        ({"inputs": IDS, "num_beams": 2}, "one row"),
        ({"inputs": IDS, "prefill_chunk_size": 16}, "prefill_chunk_size=16"),
        ({"inputs": IDS % 7 + 3, "prompt_lookup_num_tokens": 3}, "whole and without candidates"),
        ({"inputs": IDS, "use_cache": False}, "use_cache=False"),
    ],
)
def test_ways_of_generating(tiny_model, kwargs, error):
    model = tiny_model()
    with pytest.raises(ValueError, match=error), SNAP(model):
        model.generate(**kwargs, max_new_tokens=3, do_sample=False)


def test_one_at_a_time(tiny_model):
    model = tiny_model()
    with (
        SNAP(model),
        pytest.raises(ValueError, match="a peer is attached to this LlamaForCausalLM already"),
        GEM(model),
    ):
        pass
    with GEM(model):  # and it is free again
        pass


@pytest.mark.parametrize(
    ("peer", "error"),
    [
        (SNAP, "give it to the peer"),
        (GEM, "GemFilter is not combined with one"),
        (Compression(H2O(), HALF, PRUNER), "a pruner is attached"),
        (FastKV(1, HALF, HALF), "a pruner is attached"),
    ],
)
def test_a_pruner_from_outside(tiny_model, peer, error):
    model = tiny_model()
    with pytest.raises(ValueError, match=error), PRUNER(model), peer(model):
        model(input_ids=IDS)


class TestCompressedCache:
    def cache(self, model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), SNAP(model):
            output = model(input_ids=IDS, cache=cache)
        assert output.cache is cache  # the one that was given, though an empty cache is false
        return cache

    def test_gives_no_token_back(self, tiny_model):
        cache = self.cache(tiny_model())
        assert cache.get_seq_length() == 40
        assert [layer.keys.shape[2] for layer in cache.layers] == [20] * 4
        with pytest.raises(ValueError, match=r"crop\(-1\): a compressed cache cannot give tokens back"):
            cache.crop(-1)
        with pytest.raises(RuntimeError, match="a compressed cache cannot be reset"):
            cache.reset()

    def test_goes_on_outside_the_context_as_inside(self, tiny_model):
        """Layers of one length: the model's own mask and positions are right."""
        model = tiny_model()
        cache, more = self.cache(model), torch.tensor([[9, 60, 33]])
        other = copy.deepcopy(cache)
        outside = model(input_ids=more, cache=cache).logits
        with SNAP(model):
            inside = model(input_ids=more, cache=other).logits
        assert torch.equal(outside, inside)
        assert cache.get_seq_length() == 43

    def test_layers_of_different_lengths_are_not_silently_wrong_outside(self, tiny_model):
        model = tiny_model()
        on_top = Compression(H2O(), HALF, PRUNER)
        with torch.no_grad(), on_top(model):
            cache = model(input_ids=IDS).cache
        with pytest.raises(RuntimeError, match="size"):
            model(input_ids=torch.tensor([[9, 60, 33]]), cache=cache)
