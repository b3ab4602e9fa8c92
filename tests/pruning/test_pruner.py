"""Mask equals removal, batches equal rows, and what is refused: on tiny models, at every step of a generation."""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    FalconH1Config,
    Gemma3nTextConfig,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Ministral3Config,
    Olmo2Config,
    QuantizedCache,
    Qwen3NextConfig,
)

from sdtp.pruning import scorers
from sdtp.pruning.cache import PrunedLayer
from sdtp.pruning.prefill import Prefill
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.conftest import TINY, WINDOW
from tests.pruning.reference import masked_logits

GEMMA3N = {**TINY, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2, "head_dim": 8}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# transformers' eager attention takes its softmax in float32, where float64's mask value overflows to NaN under padding.
KERNELS = [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)]
PACKED = {
    "cu_seq_lens_q": torch.tensor([0, 25, 40]),
    "cu_seq_lens_k": torch.tensor([0, 25, 40]),
    "max_length_q": 25,
    "max_length_k": 25,
}
SCORERS = [
    scorers.Random(7),
    scorers.Recent(),
    scorers.HiddenNorm(),
    scorers.LastQuery(),
    "learned",
    "saliency",
]


def make_scorer(spec, rows=1, tokens=40):
    if spec == "learned":
        return scorers.Learned(32, SCHEDULE.stages, width=8)
    if spec == "saliency":
        return scorers.Saliency(torch.rand(SCHEDULE.stages, rows, tokens))
    return spec


def prompt(*lengths, width=None, side="left"):
    """Token ids and mask of rows with the given numbers of real tokens."""
    width = width or max(lengths)
    ids = torch.randint(3, 128, (len(lengths), width))
    real = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        real[row, width - n :] = 1 if side == "left" else 0
        if side == "right":
            real[row, :n] = 1
    return ids, real


def assert_close(found, expected, dtype):
    scale = max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= TOLERANCE[dtype] * scale


def survivor_columns(kept, real):
    """Column of each survivor in the padded prompt, per row."""
    first = real.shape[1] - real.sum(1)
    return [[int(first[row]) + p for p in kept[row].tolist() if p >= 0] for row in range(len(kept))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attention", "dtype"), KERNELS)
@pytest.mark.parametrize("spec", SCORERS, ids=lambda s: s if isinstance(s, str) else type(s).__name__)
def test_removal_equals_hidden_keys_at_every_survivor(tiny_model, family, attention, dtype, spec):
    model = tiny_model(family, dtype, attention)
    ids, real = prompt(40, 29)
    pruner = TokenPruner(SCHEDULE, make_scorer(spec, rows=2))
    with pruner(model) as trace, torch.no_grad():
        logits = model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0)).logits
    expected = masked_logits(model, ids, real, SCHEDULE.layers, trace.kept, prompt=40)
    assert trace.kept[-1].shape == (2, 12)
    assert logits.shape[1] == 12
    for row, columns in enumerate(survivor_columns(trace.kept[-1], real)):
        assert_close(logits[row, -len(columns) :], expected[row, columns], dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attention", "dtype"), KERNELS)
def test_every_step_of_a_generation_equals_hidden_keys(tiny_model, family, attention, dtype):
    model = tiny_model(family, dtype, attention)
    ids, real = prompt(40, 23, 9)
    with TokenPruner(SCHEDULE, scorers.Random(1))(model) as trace:
        out = model.generate(
            input_ids=ids, attention_mask=real, max_new_tokens=6, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    sequence = out.sequences
    everything = torch.cat([real, torch.ones(3, 6, dtype=real.dtype)], dim=1)
    expected = masked_logits(model, sequence, everything, SCHEDULE.layers, trace.kept, prompt=40)
    for step, logits in enumerate(out.logits):
        # generate hands out logits in float32
        assert_close(logits, expected[:, 39 + step].to(logits.dtype), torch.float32)


@pytest.mark.parametrize("always_gather", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ratio_one_is_bit_identical(tiny_model, monkeypatch, always_gather, attention):
    monkeypatch.setattr(Prefill, "always_gather", always_gather)
    model = tiny_model(attention=attention)
    ids, _ = prompt(40)
    schedule = PruningSchedule.geometric(num_layers=4, start=1, step=1, ratio=1.0)
    plain = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, output_logits=True,
                           return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
    with TokenPruner(schedule, scorers.Random())(model) as trace:
        pruned = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, output_logits=True,
                                return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
    assert [kept.tolist() for kept in trace.kept] == [[list(range(40))]] * 3
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, pruned.logits, strict=True))
    assert isinstance(pruned.cache.layers[1], PrunedLayer) == always_gather


@pytest.mark.parametrize("spec", SCORERS, ids=lambda s: s if isinstance(s, str) else type(s).__name__)
def test_a_row_gives_in_a_batch_what_it_gives_alone(tiny_model, spec):
    model = tiny_model(dtype=torch.float64)
    lengths = (40, 31, 5, 1)
    ids, real = prompt(*lengths)
    pruner = TokenPruner(SCHEDULE, make_scorer(spec, rows=4))
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with pruner(model) as trace:
        together = model.generate(input_ids=ids, attention_mask=real, **settings)
        kept = [k.clone() for k in trace.kept]
        for row, n in enumerate(lengths):
            if spec == "saliency":
                pruner.scorer = scorers.Saliency(make_scorer(spec, 4).labels[:, row : row + 1])
                continue  # the oracle's labels belong to a batch: its rows are compared by position below
            alone = model.generate(input_ids=ids[row : row + 1, 40 - n :], **settings)
            for stage in range(SCHEDULE.stages):
                assert kept[stage][row][kept[stage][row] >= 0].tolist() == trace.kept[stage][0].tolist()
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert_close(a[row], b[0], torch.float32)
    for row, n in enumerate(lengths):
        assert [(k[row] >= 0).sum().item() for k in kept] == SCHEDULE.surviving(n)


def test_right_padding_in_a_single_forward(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 22, side="right")
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model) as trace, torch.no_grad():
        logits = model(ids, attention_mask=real).logits
        kept = trace.kept[-1].clone()
        for row, n in enumerate((40, 22)):
            alone = model(ids[row : row + 1, :n]).logits
            count = SCHEDULE.surviving(n)[-1]
            assert kept[row][-count:].tolist() == trace.kept[-1][0].tolist()
            assert_close(logits[row, -count:], alone[0], torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_short_prompts_keep_at_least_one_token(tiny_model, n):
    model = tiny_model()
    ids, _ = prompt(n)
    schedule = PruningSchedule((1,), (0.4,), sinks=0, local=0.0, min_local=1)
    cache = DynamicCache(config=model.config)
    with TokenPruner(schedule, scorers.Random())(model) as trace, torch.no_grad():
        model(ids, cache=cache)
    kept = {1: 1, 2: 1, 3: 1, 9: 4}[n]
    assert trace.kept[0].shape == (1, kept)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [n, kept, kept, kept]


def test_an_empty_cache_passed_in_is_the_one_filled_and_holds_each_layers_survivors(tiny_model):
    model = tiny_model()
    ids, _ = prompt(20)
    cache, plain = DynamicCache(), DynamicCache()
    schedule = PruningSchedule((2,), (0.4,), sinks=1, local=0.0, min_local=2)
    with torch.no_grad():
        model(ids, cache=plain)
        with TokenPruner(schedule, scorers.LastQuery())(model) as trace:
            model(ids, cache=cache)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [20, 20, 8, 8]
    # Scoring reads the layer before and leaves it as an unpruned prefill would.
    assert torch.equal(cache.layers[1].keys, plain.layers[1].keys)
    # Rotary by original position: survivors' keys in the first pruned layer are the unpruned model's own.
    assert_close(cache.layers[2].keys, plain.layers[2].keys[:, :, trace.kept[0][0]], torch.float32)
    assert cache.layers[3].positions.tolist() == trace.kept[0].tolist()


def test_last_query_is_the_attention_of_the_layer_before(tiny_model):
    model = tiny_model("qwen3", attention="eager")
    ids, _ = prompt(30)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
        schedule = PruningSchedule((2,), (0.3,), sinks=0, local=0.0, min_local=1)
        with TokenPruner(schedule, scorers.LastQuery())(model) as trace:
            model(ids)
    importance = attentions[1][0, :, -1].mean(0)
    best = importance[:-1].topk(8).indices.tolist()
    assert trace.kept[0][0].tolist() == sorted([*best, 29])


@pytest.mark.parametrize(("attention", "dtype"), KERNELS)
@pytest.mark.parametrize("lengths", [(40,), (40, 17)])
def test_later_turns_remove_nothing_and_see_the_survivors(tiny_model, attention, dtype, lengths):
    model = tiny_model(dtype=dtype, attention=attention)
    ids, real = prompt(*lengths)
    turns, turns_real = prompt(*([7, 4][: len(lengths)]), width=7)
    last = torch.randint(3, 128, (len(lengths), 1))
    sequence = torch.cat([ids, turns, last], dim=1)
    everything = torch.cat([real, turns_real, torch.ones_like(last)], dim=1)
    positions = (everything.cumsum(1) - 1).clamp_min(0)
    with TokenPruner(SCHEDULE, scorers.Random(5))(model) as trace, torch.no_grad():
        cache = model(ids, attention_mask=real, position_ids=positions[:, :40]).cache
        copied = copy.deepcopy(cache)
        for held in (cache, copied):
            second = model(
                turns, attention_mask=everything[:, :47], position_ids=positions[:, 40:47], cache=held
            ).logits
            third = model(last, attention_mask=everything, position_ids=positions[:, 47:], cache=held).logits
        kept = [k.clone() for k in trace.kept]
    expected = masked_logits(model, sequence, everything, SCHEDULE.layers, kept, prompt=40)
    assert_close(third[:, 0], expected[:, 47], dtype)
    for row in range(len(lengths)):
        real_columns = turns_real[row].bool()
        assert_close(second[row, real_columns], expected[row, 40:47][real_columns], dtype)


def test_the_cache_knows_positions_through_decoding_reordering_and_cropping(tiny_model):
    model = tiny_model()
    ids, real = prompt(20, 15)
    schedule = PruningSchedule((2,), (0.5,), sinks=1, local=0.0, min_local=2)
    with TokenPruner(schedule, scorers.Recent())(model), torch.no_grad():
        cache = model(ids, attention_mask=real).cache
        model(ids[:, :2], attention_mask=torch.cat([real, real[:, -2:]], 1), cache=cache)
    rows = [[0, *range(11, 22)], [-1, -1, 0, *range(8, 17)]]
    assert cache.layers[2].positions.tolist() == rows
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[2].positions.tolist() == rows[::-1]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.layers[2].positions.tolist() == rows[::-1]
    cache.crop(-2)
    assert cache.layers[2].positions.tolist() == [rows[1][:-2], rows[0][:-2]]
    assert cache.get_seq_length(2) == 10
    assert cache.layers[0].positions.tolist() == [[-1] * 5 + [*range(15)], [*range(20)]]


@pytest.mark.parametrize("schedule", [SCHEDULE, PruningSchedule((3,), (0.3,), local=0.1, min_local=3)])
def test_a_refusal_leaves_the_cache_as_it_was(tiny_model, schedule):
    model = tiny_model(dtype=torch.float64)
    ids, _ = prompt(20)
    new = torch.randint(3, 128, (1, 3))
    pruner = TokenPruner(SCHEDULE, scorers.Random(2))
    with pruner(model) as trace, torch.no_grad():
        cache = model(ids).cache
        kept = [k.clone() for k in trace.kept]
    refusals = [
        (lambda: model(new, cache=cache), RuntimeError, "with pruner"),
        (lambda: cache.crop(-1), ValueError, "pruned prompt"),
        (lambda: cache.reset(), RuntimeError, "new cache"),
    ]
    for refused, error, words in refusals:
        with pytest.raises(error, match=words), torch.no_grad():
            refused()
        assert [layer.get_seq_length() for layer in cache.layers] == [20, 12, 12, 6]
    # What the first refusal advises is right afterwards, also under a pruner whose stages begin later.
    with TokenPruner(schedule, scorers.Random(2))(model), torch.no_grad():
        logits = model(new, cache=cache).logits
    sequence = torch.cat([ids, new], dim=1)
    expected = masked_logits(model, sequence, torch.ones_like(sequence), SCHEDULE.layers, kept, prompt=20)
    assert_close(logits[0], expected[0, 20:], torch.float64)


def test_marked_tokens_survive(tiny_model):
    model = tiny_model()
    ids, real = prompt(40, 30)
    protect = torch.zeros(2, 40, dtype=torch.bool)
    protect[0, [10, 11]] = True
    protect[1, [0, 15]] = True  # column 0 of the second row is padding: nothing to keep there
    with TokenPruner(SCHEDULE, scorers.Recent())(model, protect=protect) as trace, torch.no_grad():
        model(ids, attention_mask=real)
    for kept in trace.kept:
        assert {10, 11} <= set(kept[0].tolist())
        assert 5 in kept[1].tolist()
    assert [(k[0] >= 0).sum().item() for k in trace.kept] == SCHEDULE.surviving(40)


def test_no_mask_is_built_where_the_unpruned_model_builds_none(tiny_model):
    model = tiny_model()
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ids, real = prompt(40)
    with TokenPruner(SCHEDULE, scorers.Random())(model):
        model.generate(input_ids=ids, attention_mask=real, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert len(seen) == 16
    assert all(mask is None for mask in seen)


def test_two_models_at_once_and_nothing_left_behind(tiny_model):
    first, second = tiny_model(), tiny_model("qwen2")
    ids, _ = prompt(30)
    before = first(ids).logits
    pruner = TokenPruner(SCHEDULE, scorers.Random())
    with pruner(first) as one, pruner(second) as two:
        first(ids)
        assert len(one.kept) == 2
        assert not two.kept
        with pytest.raises(ValueError, match="already"), pruner(first):
            pass
    with pytest.raises(ZeroDivisionError), pruner(first):
        raise ZeroDivisionError
    assert "generate" not in first.__dict__
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in first.modules())
    assert torch.equal(first(ids).logits, before)


def test_what_a_pruned_prefill_refuses(tiny_model):
    model = tiny_model()
    ids, _ = prompt(40)
    pruner = TokenPruner(SCHEDULE, scorers.Random())
    refused = [
        (lambda: model(ids, labels=ids), "labels"),
        (lambda: model(ids, output_hidden_states=True), "output_hidden_states"),
        (lambda: model(ids, output_attentions=True), "output_attentions"),
        (lambda: model.model(ids, output_hidden_states=True), "output_hidden_states"),
        (lambda: model(ids, logits_to_keep=None), "logits_to_keep=None"),
        (lambda: model(ids, logits_to_keep=12), "logits_to_keep=12"),
        (lambda: model(ids, logits_to_keep=-3), "logits_to_keep=-3"),
        # `forward` itself, past the hooks of the model.
        (lambda: model.forward(ids, logits_to_keep=50), "logits_to_keep=50"),
        (lambda: model.forward(ids, logits_to_keep=-3), "logits_to_keep=-3"),
        (lambda: model.forward(ids, labels=ids), "labels"),
        *(
            (lambda name=name, value=value: model(ids, **{name: value}), f"{name} tells of several packed sequences")
            for name, value in PACKED.items()
        ),
        (lambda: model(ids, attention_mask=torch.ones(1, 1, 40, 40)), "4 dimensions"),
        (lambda: model(ids, attention_mask=torch.zeros(1, 40)), "no token"),
    ]
    with pruner(model):
        for call, words in refused:
            with pytest.raises(ValueError, match=words):
                call()
        assert model(ids, logits_to_keep=3).logits.shape[1] == 3
        assert model.forward(ids, logits_to_keep=3).logits.shape[1] == 3
        cache = model(ids).cache
        with pytest.raises(ValueError, match="cu_seq_lens_k tells of several packed sequences"):
            model(ids[:, :3], cache=cache, cu_seq_lens_k=PACKED["cu_seq_lens_k"])
        model(ids[:, :3], cache=cache)
    assert "forward" not in model.__dict__


# A prompt of which nothing could be computed right: that no layer has run shows in a cache that is still empty.
KNOWN_BEFORE = {
    "LastQuery without a cache": (scorers.LastQuery(), {"use_cache": False}, "call the model with use_cache=True"),
    "LastQuery, quantised": (scorers.LastQuery(), {"cache": "fp8"}, "a Fp8QuantizedLayer does not hold them"),
    "Saliency of other rows": (scorers.Saliency(torch.rand(2, 3, 40)), {}, "this prompt needs 1 rows and at least 40"),
    "Saliency of fewer tokens": (scorers.Saliency(torch.rand(2, 1, 39)), {}, "this prompt needs 1 rows and at least"),
    "Saliency of one row": (scorers.Saliency(torch.rand(2, 40)), {}, r"of shape \(2, 40\) \[stages, batch, tokens\]"),
}


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_what_can_be_known_is_refused_before_any_layer_has_run(tiny_model, name):
    scorer, given, words = KNOWN_BEFORE[name]
    model, ran = tiny_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    if "cache" in given:
        given = {"cache": QuantizedCache(backend="fp8", config=model.config)}
    with TokenPruner(SCHEDULE, scorer)(model), torch.no_grad(), pytest.raises(ValueError, match=words):
        model(prompt(40)[0], **given)
    assert not ran


@pytest.mark.parametrize("candidates", [0, 1])
def test_last_query_before_a_window_is_refused_where_its_cache_would_lack_keys(tiny_model, candidates):
    # A cache of a window holds one token fewer than the window: with a candidate the keys left would be those of
    # other tokens, one column on.
    model, ran = tiny_model("mistral_window"), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    ids, _ = prompt(WINDOW - candidates)
    settings = {"prompt_lookup_num_tokens": candidates} if candidates else {}
    ids[:, -1] = ids[:, 0]  # so that one is found
    with TokenPruner(SCHEDULE, scorers.LastQuery())(model):
        with pytest.raises(ValueError, match=f"the cache of layer 0 holds the latest {WINDOW - 1} only"):
            model.generate(ids, max_new_tokens=6, eos_token_id=None, **settings)
        assert not ran
        model.generate(ids[:, : WINDOW - 1], max_new_tokens=2, eos_token_id=None)


@pytest.mark.parametrize("keep", [(0.6, 0.3), (1.0, 0.3)])
def test_scores_that_are_not_numbers_name_the_stage(tiny_model, keep):
    class Broken:
        def score(self, view):
            return torch.full(view.positions.shape, torch.nan if view.stage == 1 else 0.0)

    model = tiny_model()
    schedule = dataclasses.replace(SCHEDULE, keep=keep)
    with pytest.raises(ValueError, match="NaN scores at stage 1"), TokenPruner(schedule, Broken())(model):
        model(prompt(40)[0])


class FailsSecond:
    """Gives numbers for the first prompt, and then NaN, or an exception, at the last stage."""

    question_conditioned = False

    def __init__(self, how):
        self.how, self.calls = how, 0

    def score(self, view):
        self.calls += 1
        if self.calls == 4 and self.how == "raises":
            raise ZeroDivisionError
        return torch.full(view.positions.shape, torch.nan if self.calls == 4 else 0.0)


@pytest.mark.parametrize("how", ["NaN", "raises"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_prefill_that_failed_leaves_no_trace_and_no_cache_to_go_on_with(tiny_model, how, with_config):
    model = tiny_model()
    ids, _ = prompt(40)
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    interrupted = "a forward pass on this cache was interrupted"
    with TokenPruner(SCHEDULE, FailsSecond(how))(model) as trace, torch.no_grad():
        model(ids)
        assert len(trace.kept) == 2
        with pytest.raises((ValueError, ZeroDivisionError)):
            model(ids, cache=cache)
        assert (trace.kept, trace.prompt_lengths) == ([], [])
        for one in (cache, copy.deepcopy(cache)):
            with pytest.raises(RuntimeError, match=interrupted):
                model(ids[:, :1], cache=one)
    for one in (cache, copy.deepcopy(cache)):
        with pytest.raises(RuntimeError, match=interrupted), torch.no_grad():
            model(ids[:, :1], cache=one)


def test_cached_positions_may_be_on_another_device_than_what_comes(tiny_model):
    """A model may be spread over devices: its mask is on the first, a beam's indices wherever `generate` made them."""
    model = tiny_model()
    ids, real = prompt(20, 15)
    with TokenPruner(SCHEDULE, scorers.Recent())(model), torch.no_grad():
        layer = model(ids, attention_mask=real).cache.layers[2]
    layer._positions, layer._columns = layer._positions.to("meta"), layer._columns.to("meta")
    layer.expect(torch.tensor([[True], [False]]), 1)
    assert (layer.positions.device.type, tuple(layer.positions.shape)) == ("meta", (2, 13))

    class Elsewhere(torch.Tensor):
        """Indices that only tensors of their device can be indexed with, as those of a GPU."""

        moved: ClassVar[list[torch.device]] = []

        def to(self, device):
            self.moved.append(device)
            return self.as_subclass(torch.Tensor)

    layer.padded = False  # whether any is left is read, and meta tensors have nothing to read
    indices = torch.tensor([1]).as_subclass(Elsewhere)
    layer.batch_select_indices(indices)
    assert layer.rows == 1
    assert Elsewhere.moved == [torch.device("meta")] * 2


def test_protect_of_another_shape_is_refused(tiny_model):
    model = tiny_model()
    for shape in ((0, 40), (40,), (1, 39), (2, 40)):
        protect = torch.ones(shape, dtype=torch.bool)
        with pytest.raises(ValueError, match="protect is"), TokenPruner(SCHEDULE, scorers.Random())(model, protect):
            model(prompt(40)[0])
    # Rows are the prompt's: in `generate` beams repeat them, in a plain forward nothing does.
    two, ids = torch.ones(2, 40, dtype=torch.bool), prompt(40)[0].repeat(4, 1)
    with pytest.raises(ValueError, match=r"\[4, 40\]"), TokenPruner(SCHEDULE, scorers.Random())(model, two):
        model(ids)
    with TokenPruner(SCHEDULE, scorers.Random())(model, two):
        model.generate(ids[:2], num_return_sequences=2, do_sample=True, max_new_tokens=2)


def test_models_of_another_kind_or_size_are_refused_by_name(tiny_model):
    with pytest.raises(TypeError, match="Linear is not supported: it is no transformers model"):
        TokenPruner(SCHEDULE, scorers.Random())(torch.nn.Linear(2, 2)).__enter__()
    with pytest.raises(ValueError, match="hidden size 16"):
        TokenPruner(SCHEDULE, scorers.Learned(16, 2))(tiny_model()).__enter__()
    with pytest.raises(ValueError, match="0 to 1 only"):
        TokenPruner(SCHEDULE, scorers.Random())(tiny_model(num_hidden_layers=2)).__enter__()
    with pytest.raises(ValueError, match="3 stages, the schedule has 2"):
        TokenPruner(SCHEDULE, scorers.Learned(32, 3))
    with pytest.raises(ValueError, match="5 stages, the schedule has 2"):
        TokenPruner(SCHEDULE, scorers.Saliency(torch.rand(5, 1, 40)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Ministral3Config(**TINY, sliding_window=None), "its attention computes with position_ids"),
        (Llama4TextConfig(**TINY, intermediate_size_mlp=64, head_dim=8), "layers of type chunked_attention"),
        (Gemma3nTextConfig(**GEMMA3N), "the keys and values of others"),
        (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "type linear_attention"),
        (Lfm2Config(**TINY, layer_types=["conv", "full_attention"] * 2), "layers of type conv"),
        (Qwen3NextConfig(**TINY, layer_types=["linear_attention", "full_attention"] * 2), "type linear_attention"),
        (FalconH1Config(**TINY, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16), "layers of type hybrid"),
        (GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2), "the length of the prompt"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_decoders_that_would_be_pruned_wrong_are_refused(config, reason):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TypeError, match=f"{type(model).__name__} is not supported: .*{reason}"):
        TokenPruner(SCHEDULE, scorers.Random())(model).__enter__()


def test_a_bare_decoder_is_refused(tiny_model):
    with pytest.raises(TypeError, match="LlamaModel has no language-model head"):
        TokenPruner(SCHEDULE, scorers.Random())(tiny_model().model).__enter__()


@pytest.mark.parametrize("make", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_models_without_a_head_of_tokens_are_refused(make):
    """Their heads look for the input's columns among survivors."""
    model = make.from_config(LlamaConfig(**TINY))
    with pytest.raises(TypeError, match=f"{type(model).__name__} has no language-model head: .*a causal LM is needed"):
        TokenPruner(SCHEDULE, scorers.Random())(model).__enter__()


def test_last_query_refuses_query_norms_it_does_not_know():
    model = AutoModelForCausalLM.from_config(Olmo2Config(**TINY))
    with pytest.raises(TypeError, match=r"layer 0's Olmo2Attention: its Olmo2RMSNorm of queries is not over the 8"):
        TokenPruner(SCHEDULE, scorers.LastQuery())(model).__enter__()


def test_an_own_generate_of_the_model_is_put_back(tiny_model):
    model = tiny_model()
    own = model.generate
    model.generate = own
    with TokenPruner(SCHEDULE, scorers.Random())(model):
        assert model.__dict__["generate"] is not own
    assert model.__dict__["generate"] is own
