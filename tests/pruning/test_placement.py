"""Where a model is and in what precision it computes: offloaded, split over processes, 16 bits, under autocast."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from sdtp import PruningSchedule, TokenPruner, scorers
from tests.conftest import FAMILIES, TINY
from tests.pruning import tensor_parallel
from tests.pruning.reference import additive, masked_logits, visible_keys

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
SETTINGS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}
HALF = [torch.float16, torch.bfloat16]


def make_scorer(name):
    return scorers.Learned(32, SCHEDULE.stages, width=8) if name == "Learned" else getattr(scorers, name)()


def prompt(*lengths):
    """Token ids padded on the left, and their mask, 1 at real tokens."""
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    return ids, torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()


def assert_same_survivors(kept, scores, others, lengths, gap):
    """Rows keep the same tokens, or their first difference is among tokens whose scores are as good as equal.

    Args:
        kept: per stage [rows, kept], a trace.
        scores: per stage [rows, tokens entering it], what that trace was chosen by.
        others: the other trace.
        lengths: real tokens of each row.
        gap: largest difference of scores that counts as equal, as a fraction of the row's range.

    Returns:
        The rows that keep the same at every stage.
    """
    same = []
    for row, n in enumerate(lengths):
        present = list(range(n))
        for mine, theirs, values in zip(kept, others, scores, strict=True):
            a, b = ([p for p in k[row].tolist() if p >= 0] for k in (mine, theirs))
            assert len(a) == len(b)
            if a != b:
                by_position = dict(zip(present, values[row, -len(present) :].tolist(), strict=True))
                swapped = [by_position[p] for p in set(a) ^ set(b)]
                spread = max(by_position.values()) - min(by_position.values())
                assert max(swapped) - min(swapped) <= gap * spread
                break
            present = a
        else:
            same.append(row)
    return same


# --- accelerate's hooks ---


def from_disk_and_memory(folder):
    """Layers and head alternately in memory and left on the disk."""
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"]
    places = {part: ("cpu", "disk")[i % 2] for i, part in enumerate(parts)} | {"model.rotary_emb": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "offload")


def all_in_memory(folder):
    """Every weight brought to its module for the time of its forward."""
    return cpu_offload(AutoModelForCausalLM.from_pretrained(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["Learned", "LastQuery", "HiddenNorm"])
@pytest.mark.parametrize(("load", "absent"), [(from_disk_and_memory, 23), (all_in_memory, 47)])
def test_offloaded_weights_give_what_weights_in_place_give(tiny_model, tmp_path, name, load, absent):
    # This family norms its queries: one more module that LastQuery calls by itself.
    tiny_model("qwen3").save_pretrained(tmp_path)
    plain, placed = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)
    ids, real = prompt(40, 29)
    pruner = TokenPruner(SCHEDULE, make_scorer(name))
    with pruner(plain) as trace:
        expected = plain.generate(ids, attention_mask=real, **SETTINGS)
    with pruner(placed) as found_trace:
        found = placed.generate(ids, attention_mask=real, **SETTINGS)
        assert sum(weight.is_meta for weight in placed.parameters()) == absent
    assert [k.shape[1] for k in trace.kept] == [24, 12]
    assert all(torch.equal(a, b) for a, b in zip(found_trace.kept, trace.kept, strict=True))
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()  # kernels may round by where in memory weights are


# --- tensor parallelism ---


FAMILIES_SPLIT = ["qwen2", "qwen3"]  # biases of queries, and norms of them
SPLIT_SCORERS = ["Learned", "LastQuery", "HiddenNorm", "DiffersByRank"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Per family what two gloo processes that share a model's weights give, and what one with all of them gives."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for family in FAMILIES_SPLIT:
        config_class, model_class, extra = FAMILIES[family]
        torch.manual_seed(1234)
        model_class(config_class(**{**TINY, **extra})).save_pretrained(folder / family)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tensor_parallel.__file__, str(folder), *(str(folder / family) for family in FAMILIES_SPLIT)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    together = {}
    for family in FAMILIES_SPLIT:
        assert [rank[family]["query_rows"] for rank in found] == [16, 16]  # of 32: the model is split
        alone = AutoModelForCausalLM.from_pretrained(folder / family).eval()
        together[family] = ([rank[family]["generations"] for rank in found], tensor_parallel.generations(alone))
    return together


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_SPLIT)
@pytest.mark.parametrize("name", SPLIT_SCORERS)
def test_ranks_keep_the_same_tokens_and_give_what_one_process_gives(ranks, family, name):
    (first, second), alone = ranks[family]
    first, second, alone = first[name], second[name], alone[name]
    assert [k.shape for k in first["kept"]] == [(2, 24), (2, 12)]
    assert all(torch.equal(a, b) for a, b in zip(first["kept"], second["kept"], strict=True))
    assert torch.equal(first["sequences"], second["sequences"])
    assert torch.equal(first["logits"], second["logits"])
    lengths = tensor_parallel.LENGTHS
    rows = assert_same_survivors(alone["kept"], alone["scores"], first["kept"], lengths, gap=1e-5)
    assert rows  # or nothing is compared below
    assert torch.equal(first["sequences"][rows], alone["sequences"][rows])
    difference = (first["logits"] - alone["logits"])[rows].abs().max().item()
    assert difference <= 1e-5 * alone["logits"].abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_SPLIT)
def test_scores_that_differ_by_rank_are_the_first_ranks(ranks, family):
    (first, second), alone = (ranks[family][0], ranks[family][1]["DiffersByRank"])
    scores = [rank["DiffersByRank"]["scores"][0] for rank in (first, second)]
    assert torch.equal(scores[0], -scores[1])
    torch.testing.assert_close(scores[0], alone["scores"][0], rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_SPLIT)
def test_last_query_attention_is_the_mean_over_the_heads_of_all_ranks(ranks, family):
    (first, second), alone = ranks[family]
    first, second, alone = (one["LastQuery"]["scores"][0] for one in (first, second, alone))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-7)


# --- 16 bits ---


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt", "bloom"])
def test_removal_equals_hidden_keys_up_to_the_rounding_of_16_bits(tiny_model, family, dtype):
    """The unpruned graph rounds as well: removal comes as near to what float64 gives as hiding does."""
    model = tiny_model(family, dtype)
    exact = copy.deepcopy(model).double()
    ids, real = prompt(40)
    with TokenPruner(SCHEDULE, scorers.Random(1))(model) as trace, torch.no_grad():
        logits = model(ids).logits[0]
    assert logits.dtype == dtype
    hidden, truth = (
        masked_logits(one, ids, real, SCHEDULE.layers, trace.kept, prompt=40)[0][trace.kept[-1][0]].double()
        for one in (model, exact)
    )
    rounding = torch.finfo(dtype).eps * truth.abs().max()  # of one operation at the largest logit
    assert (logits - hidden).abs().max() <= 2 * rounding
    assert (logits - truth).abs().max() <= (hidden - truth).abs().max() + 2 * rounding


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["Learned", "LastQuery", "HiddenNorm"])
def test_scores_are_ranked_in_float32(tiny_model, dtype, name):
    """In 16 bits some of 400 scores would be equal."""
    model = tiny_model(dtype=dtype)
    ids, real = prompt(400)
    scorer = make_scorer(name)
    scores = tensor_parallel.recorded(scorer)
    with TokenPruner(SCHEDULE, scorer)(model) as trace, torch.no_grad():
        model(ids, attention_mask=real)
    assert [values.dtype for values in scores] == [torch.float32] * 2
    assert all(values.unique().numel() == values.numel() for values in scores)
    assert scores[0].to(dtype).unique().numel() < 400
    free = scores[0][0, 2:-40]  # without sinks and tail
    best = (free.topk(SCHEDULE.surviving(400)[0] - 42).indices + 2).sort().values
    assert trace.kept[0][0].tolist() == [0, 1, *best.tolist(), *range(360, 400)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["Learned", "HiddenNorm"])
def test_scores_of_16_bit_states_are_those_of_the_same_states_in_float32(dtype, name):
    scorer, hidden = make_scorer(name), 100 * torch.randn(1, 50, 32, dtype=dtype)
    positions, lengths = torch.arange(50)[None], torch.tensor([50])
    of_16, of_32 = (
        scorer.score(scorers.StageView(0, 1, states, positions, lengths, lambda: hidden))
        for states in (hidden, hidden.float())
    )
    assert torch.equal(of_16, of_32)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_ties_go_to_the_earlier_token(tiny_model, dtype):
    class Coarse:
        question_conditioned = False

        def score(self, view):
            # Equal within tens; what float64 tells apart beyond float32 is no difference.
            return (view.positions // 10 % 2 + 1e-12 * view.positions.double()).to(dtype)

    model = tiny_model(dtype=torch.bfloat16)
    schedule = PruningSchedule((1,), (0.5,), sinks=0, local=0.0, min_local=1)
    with TokenPruner(schedule, Coarse())(model) as trace, torch.no_grad():
        model(prompt(60)[0])
    # 30 tokens score 1, and 30 are kept; of 15 the last is protected.
    assert trace.kept[0][0].tolist() == [*range(10, 20), *range(30, 40), *range(50, 60)]
    with TokenPruner(schedule.with_ratio(0.25), Coarse())(model) as trace, torch.no_grad():
        model(prompt(60)[0])
    assert trace.kept[0][0].tolist() == [*range(10, 20), *range(30, 34), 59]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["Learned", "LastQuery", "HiddenNorm"])
def test_padded_rows_give_in_16_bits_what_they_give_alone(tiny_model, dtype, name):
    model = tiny_model(dtype=dtype)
    lengths = (40, 31, 17)
    ids, real = prompt(*lengths)
    positions = (real.cumsum(1) - 1).clamp_min(0)
    scorer = make_scorer(name)
    scores = tensor_parallel.recorded(scorer)
    with TokenPruner(SCHEDULE, scorer)(model) as trace, torch.no_grad():
        together = model(ids, attention_mask=real, position_ids=positions).logits
        kept, by = list(trace.kept), list(scores)
        compared = 0
        for row, n in enumerate(lengths):
            alone = model(ids[row : row + 1, -n:]).logits[0]
            # The states differ by the rounding of 16 bits, and the scores with them.
            eps = torch.finfo(dtype).eps
            own = [k[row : row + 1] for k in kept], [values[row : row + 1] for values in by]
            if assert_same_survivors(*own, trace.kept, (n,), gap=4 * eps):
                compared += 1
                difference = (together[row, -len(alone) :] - alone).abs().max()
                assert difference <= 4 * eps * alone.abs().max()
    assert compared >= 2


# --- autocast, inference mode, gradients ---


@pytest.mark.parametrize("name", ["Learned", "LastQuery", "HiddenNorm"])
def test_under_autocast_scores_are_float32_and_removal_equals_hidden_keys(tiny_model, name):
    model = tiny_model()
    ids, real = prompt(200)
    scorer = make_scorer(name)
    scores = tensor_parallel.recorded(scorer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with TokenPruner(SCHEDULE, scorer)(model) as trace:
            logits = model(ids).logits[0]
        expected = masked_logits(model, ids, real, SCHEDULE.layers, trace.kept, prompt=200)[0][trace.kept[-1][0]]
    assert logits.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (logits - expected).abs().max() <= 2 * rounding
    assert all(values.unique().numel() == values.numel() for values in scores)


def test_inference_mode_gives_what_no_grad_gives(tiny_model):
    model = tiny_model()
    ids, real = prompt(40, 29)
    with TokenPruner(SCHEDULE, scorers.LastQuery())(model):
        expected = model.generate(ids, attention_mask=real, **SETTINGS)
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=real, **SETTINGS)
            cache = model(ids[:1]).cache
        # What was made inside goes on outside.
        with torch.no_grad():
            later = model(ids[:1, :3], cache=cache).logits
            usual = model(ids[:1, :3], cache=model(ids[:1]).cache).logits
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    assert torch.equal(later, usual)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_hidden_keys(tiny_model, checkpointing):
    """Also where layers are run a second time in the backward."""
    model = tiny_model(dtype=torch.float64).requires_grad_(True)
    scorer = make_scorer("Learned")
    if checkpointing:
        model.train().activation_checkpointing_enable()
    ids, real = prompt(40)
    with TokenPruner(SCHEDULE, scorer)(model) as trace:
        model(ids).logits.square().sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    hidden = copy.deepcopy(model).eval()
    for layer, mask in enumerate(visible_keys(hidden, real, SCHEDULE.layers, trace.kept, prompt=40)):
        replaced = {"attention_mask": additive(mask, torch.float64)}
        hidden.model.layers[layer].register_forward_pre_hook(
            lambda module, args, kwargs, replaced=replaced: (args, {**kwargs, **replaced}), with_kwargs=True
        )
    hidden(ids, use_cache=False).logits[0, trace.kept[-1][0]].square().sum().backward()
    for name, weight in hidden.named_parameters():
        scale = weight.grad.abs().max()
        assert scale > 0
        assert (found[name] - weight.grad).abs().max() <= 1e-9 * scale
    assert all(weight.grad is None for weight in scorer.parameters())  # a choice has no gradient
