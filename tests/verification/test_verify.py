"""`sdtp verify`'s checks: exact on every family, wrong for every mutant, and no fault is taken for a refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re

import pytest
import torch

from sdtp.pruning import layer_inputs, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.verification import verify
from sdtp.verification.families import FAMILIES, tiny_model
from sdtp.verification.hidden_keys import hidden_keys, masked_logits
from sdtp.verification.trial import Float64Throughout, MismatchError, Trial, largest, same_tokens, worst_step
from sdtp.verification.verify import MODES, Verification, mask_equals_removal
from tests import conftest
from tests.pruning import reference, test_mutants

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
REFUSED = {
    "static cache", "use_cache=False", "chunked prefill", "labels", "output_hidden_states", "output_attentions",
    "logits_to_keep past the tail", "crop into the prompt", "continuous batching", "a second pruner",
}  # fmt: skip
# They look at what comes after a context alone.
NOTHING_INSIDE = {"cache outside the context", "model after the context"}
# Beyond these every mode is exact in every family.
NOT_RUN = {
    "bloom": {"custom position_ids"},  # its positions come from the padding mask
    "gemma3": {"quantised cache, same rounding"},  # transformers quantises no sliding layers
    "mistral_window": {"quantised cache, same rounding"},
}
# A layer needs a mask of its own: more than a model makes outside a pruner's context.
REFUSED_OUTSIDE = {"bloom", "gemma3", "mistral_window"}


def verification(family="llama", scorer=None, schedule=SCHEDULE, dtype=torch.float64):
    prompt = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(5))
    return Verification(tiny_model(family, dtype), TokenPruner(schedule, scorer or scorers.Random(1)), prompt)


# --- the reference ---


@pytest.mark.parametrize("family", conftest.FAMILIES)
def test_reference_equals_the_tests_own(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids = torch.randint(3, 128, (2, 46))  # 40 of prompt; the second row has 9 tokens there and 4 after
    real = torch.ones_like(ids)
    real[1, :31], real[1, 40:42] = 0, 0
    kept = [
        torch.tensor([[0, 1, 3, 5, 9, 13, 30, 39], [-1, -1, 0, 1, 2, 5, 7, 8]]),
        torch.tensor([[0, 9, 39], [-1, 2, 8]]),
    ]
    with Float64Throughout(), torch.no_grad():
        found = masked_logits(model, ids, (1, 3), kept, 40, real)
        expected = reference.masked_logits(model, ids, real, (1, 3), kept, prompt=40)
        seen = real.bool() & (torch.arange(46) >= 39)
        assert (found[seen] - expected[seen]).abs().max() <= 1e-12
        assert (found[0, [0, 9]] - expected[0, [0, 9]]).abs().max() <= 1e-12
        whole = masked_logits(model, ids, (), [], 40, real)
        unpruned = reference.masked_logits(model, ids, real, (), [], prompt=40)
    assert (whole[real.bool()] - unpruned[real.bool()]).abs().max() <= 1e-12
    assert (whole[0, 39] - found[0, 39]).abs().max() > 1e-2


def test_reference_takes_position_ids(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 128, (1, 20))
    kept = [torch.tensor([[0, 1, 3, 5, 9, 13, 18, 19]])]
    moved = torch.arange(20)[None] + 7 * (torch.arange(20) >= 10)
    with Float64Throughout():
        found = masked_logits(model, ids, (1,), kept, 20, position_ids=moved)
        further = masked_logits(model, ids, (1,), kept, 20, position_ids=moved + 50)
        without = masked_logits(model, ids, (1,), kept, 20)
    # Rotary positions are relative: moved on together, all tokens give what they gave.
    assert (found - further).abs().max() <= 1e-12
    assert (found - without)[0, 19].abs().max() > 1e-2


def test_reference_puts_a_kernel_aside_that_takes_no_mask():
    ids, kept = torch.randint(3, 128, (1, 20)), [torch.tensor([[0, 3, 19]])]
    model = tiny_model("llama", torch.float32, attention="flex_attention")
    found = masked_logits(model, ids, (1,), kept, 20)
    assert torch.equal(found, masked_logits(tiny_model("llama", torch.float32), ids, (1,), kept, 20))
    assert model.config._attn_implementation == "flex_attention"


def test_reference_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model(dtype=torch.float64, attention="sdpa")
    ids = torch.randint(3, 128, (1, 20))
    with torch.no_grad():
        before = model(ids).logits
        with (
            pytest.raises(RuntimeError, match="inside"),
            hidden_keys(model, (1,), [torch.tensor([[0, 19]])], torch.ones_like(ids).bool(), 20),
        ):
            raise RuntimeError("inside")
        assert torch.equal(model(ids).logits, before)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


# --- the modes ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_is_exact_or_refused(family):
    checks = verification(family)
    assert checks.reference().verdict == "exact"
    results = {mode: checks.run(mode) for mode in MODES}
    not_run = {"offloaded cache"} - ({"offloaded cache"} if torch.accelerator.is_available() else set())
    refused = REFUSED | ({"cache outside the context"} if family in REFUSED_OUTSIDE else set())
    for verdict, modes in (("refused", refused), ("not run", not_run | NOT_RUN.get(family, set())), ("wrong", set())):
        assert {mode for mode, result in results.items() if result.verdict == verdict} == modes, results
    differences = [result.difference for result in results.values() if result.verdict == "exact"]
    assert max(differences) < 1e-12  # 1e-9 of logits of 4 would count as exact
    assert checks.effect > 0.1
    assert checks.survivors == [24, 12]


@pytest.mark.parametrize(
    ("mutant", "family", "mode"),
    [
        (test_mutants.compacted_positions, "llama", "plain forward"),
        (test_mutants.compacted_positions, "llama", "custom position_ids"),
        (test_mutants.soft_scaled_states, "llama", "greedy"),
        (test_mutants.dropped_padding, "llama", "left-padded batch"),
        (test_mutants.dropped_padding, "llama", "right-padded forward"),
        (test_mutants.window_over_surviving_slots, "mistral_window", "several new tokens at once"),
        (test_mutants.window_over_surviving_slots, "gemma3", "crop after the prompt"),
        (test_mutants.window_forgotten, "mistral_window", "plain forward"),
        (test_mutants.window_forgotten, "gemma3", "beam search"),
        (test_mutants.one_rotary_table, "gemma3", "sampling"),
        (test_mutants.one_rotary_table, "gemma3", "document cache, 2 questions"),
        (test_mutants.state_kept_between_calls, "llama", "several turns on one cache"),
        (test_mutants.unsorted_survivors, "llama", "protected tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_mutant_is_wrong(monkeypatch, mutant, family, mode):
    checks = verification(family)
    assert checks.run(mode).verdict == "exact"
    mutant(monkeypatch.setattr)
    result = checks.run(mode)
    assert result.verdict == "wrong"
    assert result.difference is None or result.difference > 1e-2
    assert result.reason


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in REFUSED | NOTHING_INSIDE])
def test_no_mode_overlooks_one_logit(monkeypatch, mode):
    checks = verification()
    if checks.run(mode).verdict == "not run":
        pytest.skip(checks.run(mode).reason)
    attach = Trial.pruned

    def raised(module, args, output):
        output.logits[..., -1, 7] += 1e-3

    @contextlib.contextmanager
    def biased(self, **options):
        handle = self.model.register_forward_hook(raised)
        try:
            with attach(self, **options) as trace:
                yield trace
        finally:
            handle.remove()

    monkeypatch.setattr(Trial, "pruned", biased)
    result = checks.run(mode)
    assert result.verdict == "wrong"
    assert result.difference == pytest.approx(1e-3, rel=1e-6) or "1.0e-03 where not a bit may" in result.reason


# What the modes themselves hold on to, beside logits: each fault is put into the model, pruner or cache.
def other_tokens_kept_each_time(monkeypatch, checks):
    calls = iter(range(1000))
    monkeypatch.setattr(scorers.Random, "score", lambda self, view: torch.rand(view.positions.shape) + next(calls))


def scores_of_other_beams(monkeypatch, checks):
    generate = checks._trial.model.generate

    def other(*args, **settings):
        out = generate(*args, **settings)
        out.sequences_scores = out.sequences_scores.flip(0)
        return out

    monkeypatch.setattr(checks._trial.model, "generate", other)


def last_token_doubled_by_the_streamer(monkeypatch, checks):
    generate = checks._trial.model.generate

    def doubled(*args, streamer, **settings):
        out = generate(*args, streamer=streamer, **settings)
        streamer.put(out.sequences[:, -1])
        return out

    monkeypatch.setattr(checks._trial.model, "generate", doubled)


def marks_forgotten(monkeypatch, checks):
    call = TokenPruner.__call__
    monkeypatch.setattr(TokenPruner, "__call__", lambda self, model, protect=None, **rest: call(self, model, **rest))


def ratio_forgotten(monkeypatch, checks):
    call = TokenPruner.__call__
    monkeypatch.setattr(TokenPruner, "__call__", lambda self, model, ratio=None, **rest: call(self, model, **rest))


def weights_changed_inside(monkeypatch, checks):
    attach = Trial.pruned

    def changing(self, **options):
        with torch.no_grad():
            self.model.lm_head.weight[5] += 1e-12
        return attach(self, **options)

    monkeypatch.setattr(Trial, "pruned", changing)


@pytest.mark.parametrize(
    ("fault", "mode", "reason"),
    [
        (other_tokens_kept_each_time, "beam search", "beams of one prompt kept different tokens"),
        (other_tokens_kept_each_time, "prompt lookup", "other prompt tokens survive than under greedy decoding"),
        (last_token_doubled_by_the_streamer, "processor, criteria, streamer", "the streamer got other tokens"),
        (scores_of_other_beams, "beam search", r"\|Δ logit\| up to"),
        (marks_forgotten, "protected tokens", "a marked token was removed"),
        (ratio_forgotten, "ratio of one call", r"\[24, 12\] tokens survive where \[20, 10\] are due"),
        (ratio_forgotten, "ratio 1.0, bit for bit", "where not a bit may|logits of shape"),
        (weights_changed_inside, "model after the context", "logits after the context are not those before it"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_other_faults_are_wrong(monkeypatch, fault, mode, reason):
    checks = verification()
    assert checks.run(mode).verdict == "exact"
    fault(monkeypatch, checks)
    result = checks.run(mode)
    assert result.verdict == "wrong"
    assert re.search(reason, result.reason)


def nan_tables(monkeypatch):
    cut = layer_inputs.LayerInputs.rotary
    nan = lambda self, *args: tuple(part * torch.nan for part in cut(self, *args))  # noqa: E731
    monkeypatch.setattr(layer_inputs.LayerInputs, "rotary", nan)


def test_nan_is_wrong(monkeypatch):
    checks = verification()
    nan_tables(monkeypatch)
    result = checks.run("several new tokens at once")
    assert result.verdict == "wrong"
    assert math.isnan(result.difference)


class Raising:
    """A scorer of the caller's own with a fault."""

    question_conditioned = False

    def __init__(self, prompts):
        self.prompts = prompts

    def score(self, view):
        self.prompts -= 1
        if self.prompts < 0:
            raise ValueError("a fault of its own")
        return view.positions.float()


def test_only_what_the_pruner_raises_on_purpose_is_a_refusal(monkeypatch):
    checks = verification(scorer=Raising(2))  # one prefill of two stages
    result = checks.run("greedy")
    assert (result.verdict, result.reason) == ("wrong", "ValueError: a fault of its own")
    checks = verification()
    monkeypatch.setattr(scorers.Random, "score", lambda self, view: None)
    result = checks.run("greedy")
    assert result.verdict == "wrong"
    assert result.reason.startswith("AttributeError")


def test_what_the_unpruned_model_cannot_do_either_is_not_run(monkeypatch):
    checks = verification()

    def broken(*args, **settings):
        raise OSError("no generation here")

    monkeypatch.setattr(checks._trial.model, "generate", broken)
    result = checks.run("greedy")
    assert (result.verdict, result.reason) == ("not run", "the unpruned model fails as well: no generation here")


def test_a_scorer_of_questions_has_no_document_cache():
    checks = verification(scorer=scorers.LastQuery())
    results = {mode: checks.run(mode) for mode in MODES}
    assert "chooses tokens by the end of the prompt" in results["document cache, 2 questions"].reason
    refused = {mode for mode, result in results.items() if result.verdict == "refused"}
    # A quantised cache does not hold the keys that the scorer reads.
    assert refused == REFUSED | {"document cache, 2 questions", "quantised cache, same rounding"}
    assert not [result for result in results.values() if result.verdict == "wrong"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerance_follows_the_number_format(dtype):
    checks = verification(dtype=dtype)
    assert checks.tolerance == verify.ROUNDING[dtype] * checks.largest_logit
    assert checks.effect > 2 * checks.tolerance
    assert [checks.run(mode).verdict for mode in ("plain forward", "left-padded batch", "greedy")] == ["exact"] * 3


def test_two_rows_a_prompt_left_whole_and_other_formats_are_refused():
    model, prompt = tiny_model("llama"), torch.ones(1, 40, dtype=torch.long)
    pruner = TokenPruner(SCHEDULE, scorers.Random(1))
    with pytest.raises(ValueError, match="2 rows"):
        Verification(model, pruner, prompt.expand(2, 40))
    with pytest.raises(ValueError, match="removes nothing from a prompt of 40 tokens"):
        Verification(model, pruner.with_schedule(dataclasses.replace(SCHEDULE, min_tokens=41)), prompt)
    with pytest.raises(ValueError, match="removes nothing"):
        Verification(model, TokenPruner(PruningSchedule((), ()), scorers.Random(1)), prompt)
    with pytest.raises(TypeError, match=r"weights of torch\.float8_e4m3fn are not verified"):
        Verification(model.to(torch.float8_e4m3fn), pruner, prompt)
    with torch.no_grad():
        broken = tiny_model("llama", torch.float16)
        broken.lm_head.weight *= 60000
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        Verification(broken, pruner, prompt)


def test_tokens_may_part_at_a_tie_only():
    logits = torch.tensor([[1.0, 0.0], [1.0, 1.0 - 1.9e-3], [5.0, 0.0]])
    same_tokens(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), logits, tolerance=1e-3)
    with pytest.raises(MismatchError, match="new token 1 is 1 where 0 is due"):
        same_tokens(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), logits, tolerance=0.9e-3)
    with pytest.raises(MismatchError, match="1 new tokens where 3 are due"):
        same_tokens(torch.tensor([0]), torch.tensor([0, 0, 0]), logits, tolerance=1e-3)


def test_the_largest_difference_is_nan_if_any_is():
    assert math.isnan(largest([1.0, math.nan, 2.0]))
    assert largest([1.0, 3.0, 2.0]) == 3.0
    with pytest.raises(MismatchError, match="nothing was generated"):
        worst_step((), torch.zeros(1, 4, 2), 4)


# --- one number ---


@pytest.mark.parametrize("family", ["llama", "mistral_window", "opt", "bloom"])
def test_mask_equals_removal(family):
    ids = torch.randint(3, 128, (1, 40))
    with Float64Throughout():
        assert mask_equals_removal(tiny_model(family), TokenPruner(SCHEDULE, scorers.Random(1)), ids) <= 1e-12


def test_mask_equals_removal_is_of_the_largest_logit(monkeypatch):
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 40))
    test_mutants.compacted_positions(monkeypatch.setattr)
    pruner = TokenPruner(SCHEDULE, scorers.Random(1))
    wrong = mask_equals_removal(model, pruner, ids)
    with torch.no_grad():
        model.lm_head.weight *= 8
    assert wrong > 1e-3
    assert mask_equals_removal(model, pruner, ids) == pytest.approx(wrong, rel=1e-9)


def test_a_scorer_that_reads_the_cache_can_be_verified():
    ids = torch.randint(3, 128, (1, 40))
    assert mask_equals_removal(tiny_model("llama"), TokenPruner(SCHEDULE, scorers.LastQuery()), ids) < 1e-6


def test_a_schedule_without_stages_and_a_batch_are_refused():
    with pytest.raises(ValueError, match="no stages"):
        mask_equals_removal(
            tiny_model("llama"),
            TokenPruner(PruningSchedule((), ()), scorers.Random()),
            torch.ones(1, 5, dtype=torch.long),
        )
    with pytest.raises(ValueError, match="2 rows"):
        mask_equals_removal(
            tiny_model("llama"), TokenPruner(SCHEDULE, scorers.Random(1)), torch.ones(2, 5, dtype=torch.long)
        )
