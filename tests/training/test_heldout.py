"""Held-out metrics against a computation of their own, and the choice of the best evaluation."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import heldout
from sdtp.training.agreement import stage_agreement
from sdtp.training.examples import Example
from sdtp.training.heldout import HeldOut, best_evaluation, check_choices
from sdtp.training.objective import masked_logits
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from tests.training.several import SCHEDULE, make_examples, make_model


def make_policy(seed=3, schedule=SCHEDULE):
    torch.manual_seed(seed)
    return MaskingPolicy(schedule, Learned(32, schedule.stages, width=8))


def test_kl_is_that_of_the_pruned_from_the_unpruned_model_in_nats_a_token():
    model, policy = make_model(), make_policy()
    examples = make_examples(model, 3, "held")
    found = HeldOut(model, examples, Processes(cpu=True)).evaluate(policy)
    expected = []
    for example in examples:
        n = len(example.prompt_ids)
        full = model(torch.cat([example.prompt_ids, example.response_ids])[None]).logits[0, n - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            pruned, _ = masked_logits(model, policy, example, None)
        expected.append((full.exp() * (full - pruned.log_softmax(-1))).sum(-1).mean().item())
    assert found["kl"] > 1e-4
    assert found["kl"] == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_a_schedule_that_removes_next_to_nothing_has_next_to_no_kl():
    model = make_model()
    examples = make_examples(model, 3, "held")
    schedules = [PruningSchedule((1, 3), keep, sinks=1, local=0.1, min_local=2) for keep in ((0.95, 0.95), (0.3, 0.2))]
    little, much = (
        HeldOut(model, examples, Processes(cpu=True)).evaluate(make_policy(schedule=schedule))["kl"]
        for schedule in schedules
    )
    assert 0 < little < much / 3


@pytest.mark.parametrize(
    ("room", "forwards"), [(2**30, 3 + 2 * 3), (3 * 3 * 128 * 4, 3 + 2 * 3), (4000, 2 * 3 + 2 * 3)]
)
def test_the_unpruned_model_runs_once_an_example_where_its_predictions_fit(monkeypatch, room, forwards):
    monkeypatch.setattr(heldout, "_KEPT_BYTES", room)
    model = make_model()
    examples = make_examples(model, 3, "held")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    held = HeldOut(model, examples, Processes(cpu=True))
    policy = make_policy()
    assert held.evaluate(policy) == held.evaluate(policy)
    assert len(calls) == forwards


def refused(schedule, *prompt_tokens):
    try:
        check_choices(prompt_tokens, schedule)
    except UserError:
        return True
    return False


MODEL = make_model()


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.integers(1, 24),
    shape=st.one_of(
        st.lists(st.sampled_from([1.0, 0.97, 0.9, 0.7, 0.5, 0.3, 0.1]), min_size=1, max_size=3).map(
            lambda keep: {"keep": tuple(sorted(keep, reverse=True))}
        ),
        st.integers(1, 24).map(lambda budget: {"budget": budget}),
    ),
    sinks=st.integers(0, 6),
    local=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_local=st.integers(0, 8),
    min_tokens=st.sampled_from([0, 0, 12]),
)
# All go but the protected; none goes; one of two goes; the second stage alone has a choice, with fewer protected.
@hypothesis.example(tokens=10, shape={"keep": (0.1,)}, sinks=1, local=0.0, min_local=2, min_tokens=0)
@hypothesis.example(tokens=10, shape={"keep": (1.0,)}, sinks=1, local=0.0, min_local=2, min_tokens=0)
@hypothesis.example(tokens=2, shape={"keep": (0.5,)}, sinks=0, local=0.0, min_local=0, min_tokens=0)
@hypothesis.example(tokens=9, shape={"keep": (1.0, 0.7)}, sinks=2, local=0.0, min_local=2, min_tokens=0)
@hypothesis.example(tokens=20, shape={"keep": (0.3, 0.3)}, sinks=0, local=0.5, min_local=0, min_tokens=0)
def test_held_out_prompts_are_refused_where_no_stage_would_count(tokens, shape, sinks, local, min_local, min_tokens):
    """What is known from the number of tokens is what the masked model comes to."""
    layers = (1, 2, 3)[: len(shape.get("keep", (0, 0)))]
    schedule = PruningSchedule(layers, **shape, sinks=sinks, local=local, min_local=min_local, min_tokens=min_tokens)
    torch.manual_seed(tokens)
    case = Example("case", torch.randint(3, 128, (tokens,)), torch.tensor([5, 6]), torch.rand(len(layers), tokens))
    policy = make_policy(schedule=schedule)
    with torch.no_grad():
        _, trace = masked_logits(MODEL, policy, case, None)
    assert refused(schedule, tokens) == math.isnan(stage_agreement(trace, case.saliency)[0])


def test_one_prompt_with_a_choice_is_enough_and_what_is_let_through_can_be_evaluated():
    # Of n tokens the first and the last two are protected, and 0.7 n stay: of 4 tokens 3, of 5 tokens 4.
    schedule = PruningSchedule((2,), (0.7,), sinks=1, local=0.0, min_local=2)
    with pytest.raises(UserError, match="any of the 2 held-out prompts, the longest of 4 tokens: longer ones"):
        check_choices([3, 4], schedule)
    assert not refused(schedule, 3, 5, 4)
    examples = [Example(str(n), torch.arange(3, 3 + n), torch.tensor([5, 6]), torch.rand(1, n)) for n in (3, 5, 4)]
    found = HeldOut(MODEL, examples, Processes(cpu=True)).evaluate(make_policy(schedule=schedule))
    assert all(math.isfinite(value) for value in found.values())


def test_what_is_not_finite_ends_the_training_and_names_the_example():
    def overflow(module, args, output):
        return output * torch.inf if output.shape[1] == 3 else output  # of the second response

    examples = [
        Example(name, torch.arange(30), torch.arange(tokens), torch.rand(1, 30))
        for name, tokens in (("a", 2), ("b", 3))
    ]
    hook = MODEL.lm_head.register_forward_hook(overflow)
    try:
        with pytest.raises(UserError, match=r"ce of held-out example 'b' is nan: training stopped"):
            HeldOut(MODEL, examples, Processes(cpu=True)).evaluate(make_policy(schedule=PruningSchedule((1,), (0.5,))))
    finally:
        hook.remove()


def row(kl, step):
    return {"kl": kl, "tau": 0.0}, step, "heldout"


@pytest.mark.parametrize(
    ("history", "best", "since"),
    [
        ([], None, 0),
        ([({"loss": 0.0}, 1, "labels"), ({"loss": 0.0}, 1, "train")], None, 0),
        ([row(0.5, 0)], 0, 0),
        ([row(0.5, 0), ({"loss": 0.1}, 1, "train"), row(0.4, 2), row(0.4, 4), row(0.6, 6)], 2, 2),  # earliest of equals
        ([row(0.5, 0), row(0.6, 2), row(0.3, 4)], 4, 0),
    ],
)
def test_the_best_evaluation_has_the_least_kl(history, best, since):
    assert best_evaluation(history) == (best, since)
    assert best_evaluation([[*entry] for entry in history]) == (best, since)  # as a checkpoint's JSON has it
