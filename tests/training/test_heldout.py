"""Held-out metrics against a computation of their own, and the choice of the best evaluation."""

from __future__ import annotations

import math

import pytest
import torch

from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import heldout
from sdtp.training.heldout import HeldOut, best_evaluation
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
        ([row(math.nan, 0), row(0.6, 2), row(math.nan, 4)], 2, 1),
        ([row(math.nan, 0), row(math.nan, 2)], 0, 1),
    ],
)
def test_the_best_evaluation_has_the_least_kl(history, best, since):
    assert best_evaluation(history) == (best, since)
    assert best_evaluation([[*entry] for entry in history]) == (best, since)  # as a checkpoint's JSON has it
