"""Every peer against an independent full forward in float64: what it keeps, and what decoding makes of that."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sdtp.evaluation import methods
from sdtp.evaluation.generation import generate_batch
from sdtp.evaluation.latency import Stopwatch, timed_pass
from sdtp.evaluation.peers.budgets import final_survivors, fraction, mean_entries
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.fastkv import FastKV
from sdtp.evaluation.peers.gemfilter import GemFilter
from sdtp.evaluation.peers.h2o import H2O
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.evaluation.peers.trace import Held
from sdtp.evaluation.teacher_forcing import forced_logits
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.evaluation.peers import reference
from tests.pruning.tiny import float64

N = 40
PROMPT = torch.randint(3, 128, (N,), generator=torch.Generator().manual_seed(7)).tolist()
RESPONSE = [9, 60, 33, 2, 77, 12]
TOLERANCE = 1e-9
ALL = list(range(N))
SNAP = SnapKV(window=6, kernel=3)
SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
PRUNER = TokenPruner(SCHEDULE, scorers.Random(3))


def half_up(keep):
    return (keep + 1) // 2


def pruned_layers(model):
    """What each layer holds in a prefill under PRUNER, whose own tests say that this is right."""
    with PRUNER(model) as trace:
        model(input_ids=torch.tensor([PROMPT]), use_cache=True)
    first, second = (stage[0].tolist() for stage in trace.kept)
    assert [len(first), len(second)] == [24, 12]
    return [ALL, first, first, second]


def snapkv(model):
    return reference.compression(model, PROMPT, RESPONSE, lambda n: 14, lambda keep: 6, 3, 6)


def h2o(model):
    return reference.compression(model, PROMPT, RESPONSE, lambda n: 14, lambda keep: 7, 1, None)


def h2o_on_top(model):
    keep = {40: 16, 24: 10, 12: 5}  # 0.4 of each layer's
    return reference.compression(model, PROMPT, RESPONSE, keep.__getitem__, half_up, 1, None, pruned_layers(model))


def snapkv_on_top(model):
    keep = {40: 16, 24: 10, 12: 5}
    latest = {16: 6, 10: 6, 5: 3}  # a window of 6 does not fit among 5: the latest half
    return reference.compression(
        model, PROMPT, RESPONSE, keep.__getitem__, latest.__getitem__, 3, 6, pruned_layers(model)
    )


def fastkv(model):
    going_on = reference.propagated(model, PROMPT, 1, 18, 6, 3, 6)
    assert len(going_on) == 18
    present = [ALL, ALL, going_on, going_on]
    return reference.compression(model, PROMPT, RESPONSE, lambda n: 10, lambda keep: 6, 3, 6, present)


def gemfilter(model):
    logits, selected = reference.gemfilter(model, PROMPT, RESPONSE, 2, 12)
    return logits, [[selected]] * 4


# Name -> the peer, what it has to give, and the entries of each layer.
PEERS = {
    "snapkv": (Compression(SNAP, lambda n: 14), snapkv, [14] * 4),
    "h2o": (Compression(H2O(), fraction(0.35)), h2o, [14] * 4),
    "h2o on pruning": (Compression(H2O(), fraction(0.4), PRUNER), h2o_on_top, [16, 10, 10, 5]),
    "snapkv on pruning": (Compression(SNAP, fraction(0.4), PRUNER), snapkv_on_top, [16, 10, 10, 5]),
    "fastkv": (FastKV(1, fraction(0.45), lambda n: 10, SNAP), fastkv, [10] * 4),
    "gemfilter": (GemFilter(2, fraction(0.3)), gemfilter, [12] * 4),
}


@pytest.fixture(params=PEERS)
def case(request):
    return PEERS[request.param]


def exact(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_teacher_forcing_gives_the_reference(tiny_model, case, family, attention):
    peer, expected, entries = case
    with float64():
        model = tiny_model(family, torch.float64, attention)
        logits, held = expected(model)
        found, response, kept = forced_logits(model, PROMPT, RESPONSE, peer)
        with torch.no_grad(), peer(model) as trace:
            model(input_ids=torch.tensor([PROMPT]))
    assert [positions.tolist() for positions in trace.positions] == held
    assert trace.entries == entries
    assert kept == entries[-1]
    assert response.tolist() == RESPONSE
    assert trace.prompt_tokens == N
    exact(found, logits)
    assert any(len({tuple(row) for row in layer}) > 1 for layer in held) == (len(held[0]) > 1)  # heads do differ


def test_generate_goes_on_where_teacher_forcing_does(tiny_model, case):
    """`generate` feeds one token at a time, with a mask and positions of its own that do not fit the cache."""
    peer = case[0]
    with float64():
        model = tiny_model("llama", torch.float64)
        with peer(model):
            out = model.generate(
                torch.tensor([PROMPT]), max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        response = out.sequences[0, N:].tolist()
        forced, _, _ = forced_logits(model, PROMPT, response, peer)
        unpruned, _, _ = forced_logits(model, PROMPT, response)
    exact(torch.cat(out.logits), forced)
    assert (forced - unpruned).abs().max() > 1e-3  # what was dropped mattered


def test_generate_batch_takes_one_prompt_under_a_peer(tiny_model, case):
    model, peer = tiny_model(), case[0]
    generated = generate_batch(model, peer, [PROMPT], max_new_tokens=5, pad_token_id=0)[0]
    forced, _, _ = forced_logits(model, PROMPT, generated.pruned_ids, peer)
    assert generated.pruned_ids == forced.argmax(-1).tolist()
    assert len(generated.kept) == 4
    assert all(40 >= len(layer) >= entries for layer, entries in zip(generated.kept, case[2], strict=True))


def test_the_model_is_as_before(tiny_model, case):
    model, peer = tiny_model(), case[0]
    ids = torch.tensor([PROMPT])
    before = model(input_ids=ids).logits
    with contextlib.suppress(KeyError), peer(model):
        model(input_ids=ids)
        raise KeyError
    assert "forward" not in model.__dict__
    assert "generate" not in model.__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)
    with peer(model) as held:
        assert (held.prompt_tokens, held.entries) == (0, [])


@pytest.mark.parametrize("peer", [Compression(SNAP, fraction(1.0)), Compression(H2O(), fraction(1.0)),
    FastKV(1, fraction(1.0), fraction(1.0), SNAP), GemFilter(2, fraction(1.0))],
    ids=["snapkv", "h2o", "fastkv", "gemfilter"])  # fmt: skip
def test_all_kept_is_the_unpruned_model_to_the_bit(tiny_model, peer):
    model = tiny_model()
    found, _, kept = forced_logits(model, PROMPT, RESPONSE, peer)
    assert torch.equal(found, forced_logits(model, PROMPT, RESPONSE)[0])
    assert kept == N


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("ratio", [0.4, 0.01])
def test_short_prompts_keep_at_least_one_token(tiny_model, tokens, ratio):
    model = tiny_model()
    expected = {1: 1, 2: 1, 3: 1, 9: 4}[tokens] if ratio == 0.4 else 1
    keep = fraction(ratio)
    for peer in (Compression(SnapKV(), keep), Compression(H2O(), keep), FastKV(1, keep, keep), GemFilter(2, keep)):
        logits, _, kept = forced_logits(model, PROMPT[:tokens], RESPONSE, peer)
        assert kept == expected
        assert logits.isfinite().all()
        with torch.no_grad(), peer(model) as held:
            model(input_ids=torch.tensor([PROMPT[:tokens]]))
        assert held.entries == [expected] * 4
        assert all(tokens - 1 in layer[0] for layer in held.positions)  # the last token is among them


def test_gemfilter_stops_at_its_layer_and_starts_over(tiny_model):
    """Layers 0 to 2 see the prompt, then all four the 12 tokens selected, each once."""
    model, calls = tiny_model(), []
    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda module, args, out, layer=layer: calls.append((layer, out.shape[1])))
    with torch.no_grad(), GemFilter(2, fraction(0.3))(model):
        model(input_ids=torch.tensor([PROMPT]))
    # The hook that ends the first pass at layer 2 comes after this one.
    assert calls == [(0, 40), (1, 40), (2, 40), (0, 12), (1, 12), (2, 12), (3, 12)]


def test_fastkv_hands_on_what_it_selects(tiny_model):
    model, calls = tiny_model(), []
    for module in model.model.layers:
        module.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    with torch.no_grad(), PEERS["fastkv"][0](model):
        model(input_ids=torch.tensor([PROMPT]))
    assert calls == [40, 40, 18, 18]


def test_a_timed_pass_goes_through_a_peer(tiny_model, case):
    """What latencies are measured with prefills and decodes by plain calls of the model."""
    model, peer = tiny_model(), case[0]
    with peer(model) as held:
        timing = timed_pass(model, torch.tensor([PROMPT]), 4, Stopwatch(torch.device("cpu")))
    assert timing.new_tokens == 4
    assert held.entries == case[2]


def test_what_any_head_holds_is_kept():
    held = Held(6, [torch.tensor([[0, 2, 5], [1, 2, 5]]), torch.tensor([[3, 5]])])
    assert held.entries == [3, 2]
    assert [layer.tolist() for layer in held.kept] == [[[0, 1, 2, 5]], [[3, 5]]]


class TestEqualSurvivors:
    """`methods.peer` at a schedule of 24 and 12 tokens from layers 1 and 3: 40 + 24 + 24 + 12 = 100 entries."""

    @pytest.mark.parametrize(
        ("method", "entries"),
        # FastKV hands 12 tokens on to two layers; the other two hold (100 - 24) / 2.
        [("gemfilter", [12] * 4), ("fastkv", [38, 38, 12, 12]), ("snapkv", [25] * 4), ("h2o", [25] * 4)],
    )
    def test_entries(self, tiny_model, method, entries):
        model, peer = tiny_model(), methods.peer(method, SCHEDULE, 4, 1)
        with torch.no_grad(), peer(model) as held:
            model(input_ids=torch.tensor([PROMPT]))
        assert held.entries == entries

    def test_budgets(self):
        assert SCHEDULE.layer_lengths(N, 4) == [40, 24, 24, 12]
        assert final_survivors(SCHEDULE)(N) == 12
        assert mean_entries(SCHEDULE, 4)(N) == 25

    def test_compressed_on_top(self, tiny_model):
        model = tiny_model()
        on_top = methods.compressed(methods.Fixed(PRUNER), "h2o", fraction(0.4))(PROMPT, RESPONSE)
        logits, _, kept = forced_logits(model, PROMPT, RESPONSE, on_top)
        assert kept == 5
        assert torch.equal(logits, forced_logits(model, PROMPT, RESPONSE, PEERS["h2o on pruning"][0])[0])
        alone = methods.compressed(methods.unpruned, "h2o", fraction(0.4))(PROMPT, RESPONSE)
        assert forced_logits(model, PROMPT, RESPONSE, alone)[2] == 16

    def test_a_peer_is_not_compressed_on_top(self):
        peer = methods.Fixed(GemFilter(1, fraction(0.5)))
        with pytest.raises(TypeError, match="GemFilter cannot be compressed on top"):
            methods.compressed(peer, "h2o", fraction(0.4))(PROMPT, RESPONSE)
