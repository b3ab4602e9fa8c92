"""Every family in every way of going on: removal against the two references of `reference.py`, at every step.

The references come first: they are held against the unpruned model, against attention written out by hand, and against
the mistakes that they have to notice.
"""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from torch.nn import functional

from sdtp import PruningSchedule, TokenPruner, scorers
from tests.conftest import FAMILIES, WINDOW
from tests.pruning.reference import (
    Float64Throughout,
    decoder_layers,
    logits_under_masks,
    masked_logits,
    rewritten,
    stepwise_logits,
    visible_keys,
    windows,
)

WINDOWED = ["mistral_window", "phi3_window", "gemma3", "gpt_oss"]
WITHOUT_SDPA = ["bloom", "gpt_oss"]
SETTINGS = {
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def schedule_for(family):
    """Two stages; Gemma 3 has both kinds of layer before, between and after them."""
    return PruningSchedule((2, 4) if family == "gemma3" else (1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)


def cells(*kernels):
    """A row for every family and (attention, dtype); families without sdpa have each dtype in eager, once."""
    rows = [
        (family, "eager" if family in WITHOUT_SDPA else attention, dtype)
        for family in FAMILIES
        for attention, dtype in kernels
    ]
    return pytest.mark.parametrize(
        ("family", "attention", "dtype"),
        [pytest.param(*row[:2], getattr(torch, row[2]), id="-".join(row)) for row in dict.fromkeys(rows)],
    )


def precision(dtype):
    """In float64 everything is: eager softmaxes, norms and the logits of `generate` as well."""
    return Float64Throughout() if dtype == torch.float64 else contextlib.nullcontext()


def assert_close(found, expected, dtype):
    assert found.shape == expected.shape
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    assert (found - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


def prompt(*lengths, side="left"):
    """Token ids and mask of rows with the given numbers of real tokens."""
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    real = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        real[row, slice(max(lengths) - n, None) if side == "left" else slice(n)] = 1
    return ids, real


def positions_of(model, real):
    """The argument `position_ids`, where the family takes it from the caller instead of from the padding mask."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (real.cumsum(1) - 1).clamp_min(0)}


def some_survivors(schedule, lengths):
    """A trace as `TokenPruner` writes it, drawn at random: each row's last token and others of the stage before."""
    kept, present = [], [list(range(n)) for n in lengths]
    for stage in range(schedule.stages):
        counts = [schedule.surviving(n)[stage] for n in lengths]
        present = [
            sorted([*(row[i] for i in torch.randperm(len(row) - 1)[: count - 1].tolist()), row[-1]])
            for row, count in zip(present, counts, strict=True)
        ]
        kept.append(torch.tensor([[-1] * (max(counts) - len(row)) + row for row in present]))
    return kept


def conversation(family):
    """A padded prompt of 40 columns and a padded turn of 5: ids, mask, the schedule's layers and random survivors."""
    ids, real = prompt(45, 28, 14)
    real[1, 40:43] = 0
    schedule = schedule_for(family)
    return ids, real, schedule.layers, some_survivors(schedule, [40, 23, 9])


# --- the references ---


@pytest.mark.parametrize("family", FAMILIES)
def test_both_references_agree_and_without_removal_are_the_unpruned_model(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids, real, layers, kept = conversation(family)
    everything = [torch.arange(40).expand(3, 40)] * 2
    with Float64Throughout(), torch.no_grad():
        unpruned = model(ids, attention_mask=real, **positions_of(model, real)).logits
        whole = masked_logits(model, ids, real, layers, everything, prompt=40)
        masked = masked_logits(model, ids, real, layers, kept, prompt=40)
        stepwise = stepwise_logits(model, ids, real, layers, kept, prompt=40)
    assert_close(whole[real.bool()], unpruned[real.bool()], torch.float64)
    later = real[:, 39:].bool()
    assert_close(stepwise[later], masked[:, 39:][later], torch.float64)
    assert stepwise[~later].isnan().all()
    assert (masked - unpruned)[:, 39:].abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_references_equal_attention_over_deleted_rows(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids, _, layers, kept = conversation(family)
    kept = [k[:1] for k in kept]
    weights = dict(model.named_parameters())
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)  # in float32, as the model holds them

    def norm(states, name):
        return weights[name] * states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(states, positions):  # [tokens, heads, 8]
        angles = (positions[:, None].double() * frequencies.double())[:, None]
        a, b = states[..., :4], states[..., 4:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    hidden, positions = weights["model.embed_tokens.weight"][ids[0]], torch.arange(45)
    for layer in range(4):
        if layer in layers:
            rows = [i for i, p in enumerate(positions) if p >= 40 or p in kept[layers.index(layer)][0]]
            hidden, positions = hidden[rows], positions[rows]
        name = f"model.layers.{layer}."
        states = norm(hidden, name + "input_layernorm.weight")
        q, k, v = (
            (states @ weights[f"{name}self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, 8)) for p in ("q", "k", "v")
        )
        q, k = rotated(q, positions), rotated(k, positions).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        distance = positions[:, None] - positions
        hidden_key = (distance < 0) | (distance >= (WINDOW if family == "mistral_window" else 100))
        attention = scores.masked_fill(hidden_key, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", attention, v.repeat_interleave(2, dim=1)).flatten(1)
        hidden = hidden + mixed @ weights[name + "self_attn.o_proj.weight"].T
        states = norm(hidden, name + "post_attention_layernorm.weight")
        gate, up, down = (weights[f"{name}mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        hidden = hidden + (functional.silu(states @ gate.T) * (states @ up.T)) @ down.T
    logits = norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T

    everything = torch.ones_like(ids[:1])
    with Float64Throughout():
        masked = masked_logits(model, ids[:1], everything, layers, kept, prompt=40)[0]
        stepwise = stepwise_logits(model, ids[:1], everything, layers, kept, prompt=40)[0]
    assert_close(logits, masked[positions], torch.float64)
    assert_close(logits[-6:], stepwise, torch.float64)


def slots(real, kept, prompt):
    """Index of every column [batch, tokens] among the row's survivors and what followed the prompt."""
    there = real.bool().clone()
    positions = (real.cumsum(1) - 1).clamp_min(0)
    for row, survivors in enumerate(kept):
        there[row, :prompt] &= torch.isin(positions[row, :prompt], survivors)
    return (there.cumsum(1) - 1).clamp_min(0)


def window_over_surviving_slots(model, ids, real, layers, kept):
    """A query sees as many survivors as the window has slots, however far back they were."""
    window = windows(model)
    model.config.sliding_window = None
    masks = visible_keys(model, real, layers, kept, 40)
    model.config.sliding_window = WINDOW
    for stage, start in enumerate(layers):
        index = slots(real, kept[stage], 40)
        for layer in range(start, len(masks)):
            if window[layer] is not None and start == max(s for s in layers if s <= layer):
                masks[layer] &= index[:, :, None] - index[:, None, :] < WINDOW
    return logits_under_masks(model, ids, real, masks)


def rotary(model, hidden, positions, *layer_type):
    return next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))(hidden, positions, *layer_type)


def compacted_positions(model, ids, real, layers, kept):
    """Survivors are numbered 0, 1, 2, ... from each stage on, and what follows continues from there."""

    def compact(layer, given):
        index = [slots(real, k, 40) for k, start in zip(kept, layers, strict=True) if start <= layer]
        if index and "position_embeddings" in given:
            kind = [model.config.layer_types[layer]] if model.config.model_type == "gemma3_text" else []
            return {"position_embeddings": rotary(model, given["hidden_states"], index[-1], *kind)}
        if index and "alibi" in given:
            return {"alibi": given["alibi"].diff(dim=-1)[..., :1] * index[-1]}
        return {}

    def learned(module, args, kwargs):
        positions = kwargs["position_ids"].clone()
        positions[:, 40:] = slots(real, kept[-1], 40)[:, 40:]
        return args, {**kwargs, "position_ids": positions}

    with rewritten(model, compact), contextlib.ExitStack() as hooks:
        if model.config.model_type == "opt":
            embedding = model.model.decoder.embed_positions
            hooks.callback(embedding.register_forward_pre_hook(learned, with_kwargs=True).remove)
        return masked_logits(model, ids, real, layers, kept, 40)


def one_rotary_table(model, ids, real, layers, kept):
    """Full-attention layers are handed the table of the sliding ones, from the first stage on."""

    def swap(layer, given):
        if layer < layers[0]:
            return {}
        hidden, positions = given["hidden_states"], given["position_ids"]
        return {"position_embeddings": rotary(model, hidden, positions, "sliding_attention")}

    with rewritten(model, swap):
        return masked_logits(model, ids, real, layers, kept, 40)


@pytest.mark.parametrize(
    ("mistake", "family"),
    [
        *((compacted_positions, family) for family in FAMILIES),
        *((window_over_surviving_slots, family) for family in WINDOWED),
        (one_rotary_table, "gemma3"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_tiny_models_tell_mistakes_from_the_truth(tiny_model, mistake, family):
    model = tiny_model(family, torch.float64)
    ids, _, layers, kept = conversation(family)
    ids, real, kept = ids[:1], torch.ones_like(ids[:1]), [k[:1] for k in kept]
    with Float64Throughout():
        truth = masked_logits(model, ids, real, layers, kept, 40)
        wrong = mistake(model, ids, real, layers, kept)
    # Of every token after the prompt, for a comparison at any step to notice.
    assert (wrong - truth)[0, 40:].abs().amax(-1).min() > 1e-2


# --- the matrix ---


@cells(("sdpa", "float64"), ("eager", "float64"), ("sdpa", "float32"), ("eager", "float32"))
def test_every_step_of_a_padded_batch_generation(tiny_model, family, attention, dtype):
    model = tiny_model(family, dtype, attention)
    lengths, new = (40, 23, 9), 8  # above the window, and below it until the fourth new token
    ids, real = prompt(*lengths)
    before, before_real = prompt(*reversed(lengths))
    schedule = schedule_for(family)
    with precision(dtype):
        with TokenPruner(schedule, scorers.Random(1))(model) as trace:
            # Another batch of the same shape, of which nothing may be left.
            model.generate(before, attention_mask=before_real, max_new_tokens=2, **SETTINGS)
            out = model.generate(ids, attention_mask=real, max_new_tokens=new, **SETTINGS)
        everything = torch.cat([real, torch.ones(len(lengths), new, dtype=real.dtype)], dim=1)
        expected = masked_logits(model, out.sequences, everything, schedule.layers, trace.kept, prompt=40)
    # 0.6 and 0.3 of each length, rounded; of the 9 the two sinks and the last three are protected.
    assert [(kept >= 0).sum(1).tolist() for kept in trace.kept] == [[24, 14, 5], [12, 7, 5]]
    for layer, kept in zip(schedule.layers, trace.kept, strict=True):
        assert out.cache.layers[layer].keys.shape[-2] <= kept.shape[1] + new - 1  # sliding layers may hold fewer
    for step, logits in enumerate(out.logits):
        assert_close(logits, expected[:, 39 + step], dtype)


def chosen_by_norm(schedule, stage, n, present, states):
    """Survivors of the tokens present: sinks, the tail, and those with the longest state [tokens, hidden]."""
    tail = present[-schedule.protected_tail(len(present)) :]
    forced = [p for p in present if p < schedule.sinks or p in tail]
    ranked = sorted((p for p in present if p not in forced), key=lambda p: -states[p].norm().item())
    return sorted(forced + ranked[: schedule.surviving(n)[stage] - len(forced)])


@cells(("sdpa", "float64"), ("eager", "float64"), ("sdpa", "float32"))
def test_plain_forward_of_a_right_padded_batch(tiny_model, family, attention, dtype):
    model = tiny_model(family, dtype, attention)
    lengths = (40, 22, 9)
    ids, real = prompt(*lengths, side="right")
    schedule = schedule_for(family)
    entering = {}

    def remember(layer):
        return lambda module, args, kwargs: entering.update({layer: args[0] if args else kwargs["hidden_states"]})

    with precision(dtype), torch.no_grad():
        with TokenPruner(schedule, scorers.HiddenNorm())(model) as trace:
            logits = model(ids, attention_mask=real).logits
        handles = [
            decoder_layers(model)[layer].register_forward_pre_hook(remember(layer), with_kwargs=True)
            for layer in schedule.layers
        ]
        expected = masked_logits(model, ids, real, schedule.layers, trace.kept, prompt=40)
        for handle in handles:
            handle.remove()
    for row, n in enumerate(lengths):
        present = list(range(n))
        for stage, layer in enumerate(schedule.layers):
            kept = [p for p in trace.kept[stage][row].tolist() if p >= 0]  # columns too: padding is on the right
            assert kept == chosen_by_norm(schedule, stage, n, present, entering[layer][row])
            present = kept
        assert_close(logits[row, -len(present) :], expected[row, present], dtype)


@cells(("sdpa", "float64"), ("eager", "float64"), ("sdpa", "float32"))
@pytest.mark.parametrize("lengths", [(40,), (9,), (40, 17, 6)], ids=["long", "short", "padded"])
def test_several_turns_of_several_tokens_on_one_cache(tiny_model, family, attention, dtype, lengths):
    model = tiny_model(family, dtype, attention)
    schedule = schedule_for(family)
    turns = [prompt(*lengths), prompt(*(7, 4, 5)[: len(lengths)]), prompt(*(3, 3, 1)[: len(lengths)])]
    turns.append(prompt(*(1, 1, 1)[: len(lengths)]))
    ids = torch.cat([ids for ids, _ in turns], dim=1)
    real = torch.cat([real for _, real in turns], dim=1)
    logits, end, cache = [], 0, None
    with precision(dtype), torch.no_grad():
        with TokenPruner(schedule, scorers.Random(5))(model) as trace:
            for tokens, _ in turns:
                start, end = end, end + tokens.shape[1]
                inputs = {}
                if len(lengths) > 1:
                    inputs = {name: value[:, start:] for name, value in positions_of(model, real[:, :end]).items()}
                    inputs["attention_mask"] = real[:, :end]
                out = model(tokens, cache=cache, use_cache=True, **inputs)
                cache = out.cache
                logits.append(out.logits)
        expected = stepwise_logits(model, ids, real, schedule.layers, trace.kept, prompt=max(lengths))
    assert trace.kept[-1].shape == (len(lengths), schedule.surviving(max(lengths))[-1])
    assert_close(logits[0][:, -1], expected[:, 0], dtype)
    found, followed = torch.cat(logits[1:], dim=1), real[:, max(lengths) :].bool()
    assert_close(found[followed], expected[:, 1:][followed], dtype)


@cells(("sdpa", "float64"), ("eager", "float64"))
def test_prompt_lookup_is_greedy(tiny_model, family, attention, dtype):
    model = tiny_model(family, dtype, attention)
    schedule = schedule_for(family)
    ids, new = torch.randint(3, 128, (1, 10)).repeat(1, 4), 12
    with precision(dtype):
        with TokenPruner(schedule, scorers.Random(2))(model) as trace:
            greedy = model.generate(ids, max_new_tokens=new, **SETTINGS)
            kept = list(trace.kept)
            lookup = model.generate(ids, max_new_tokens=new, prompt_lookup_num_tokens=4, **SETTINGS)
        everything = torch.ones_like(greedy.sequences)
        expected = masked_logits(model, greedy.sequences, everything, schedule.layers, trace.kept, prompt=40)
    assert all(torch.equal(a, b) for a, b in zip(kept, trace.kept, strict=True))
    assert torch.equal(lookup.sequences, greedy.sequences)
    for step in range(new):
        assert_close(greedy.logits[step], expected[:, 39 + step], dtype)
        assert_close(lookup.logits[step], expected[:, 39 + step], dtype)
