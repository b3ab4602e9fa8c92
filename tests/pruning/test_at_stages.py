"""A pruner with some of its stages alone."""

from __future__ import annotations

import pytest
import torch

from sdtp.pruning import scorers
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pruning.reference import masked_logits

SCHEDULE = PruningSchedule((1, 2, 3), (0.8, 0.4, 0.3), sinks=2, local=0.2, min_local=3, min_tokens=7)
PROMPT = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def learned(question_rank=16):
    return scorers.Learned(32, 3, width=8, position=True, question_rank=question_rank, neighbours=1, recency=0.1)


def prune(model, pruner):
    with pruner(model) as trace, torch.no_grad():
        logits = model(PROMPT).logits
    return trace.kept, logits


def test_each_stage_keeps_its_own_share():
    part = SCHEDULE.at_stages([0, 2])
    assert (part.layers, part.keep) == ((1, 3), pytest.approx((0.8, 0.8 * 0.75)))
    part = SCHEDULE.at_stages([1])
    assert (part.layers, part.keep) == ((2,), pytest.approx((0.5,)))
    assert (part.sinks, part.local, part.min_local, part.min_tokens) == (2, 0.2, 3, 7)
    assert SCHEDULE.at_stages(range(3)).keep == pytest.approx(SCHEDULE.keep)


def test_a_geometric_schedule_stays_geometric():
    every_second = PruningSchedule.geometric(num_layers=32, start=4, step=3, ratio=0.9).at_stages(range(0, 10, 2))
    assert every_second.layers == (4, 10, 16, 22, 28)
    assert every_second.surviving(1000) == [900, 810, 729, 656, 590]


def test_a_budget_is_reached_with_fewer_stages():
    part = PruningSchedule.to_budget(num_layers=8, start=1, step=2, tokens=100).at_stages([1, 3])
    assert part == PruningSchedule((3, 7), budget=100)
    assert part.surviving(400) == [200, 100]


@pytest.mark.parametrize("stages", [[], [1, 0], [1, 1], [-1], [0, 3]])
def test_stages_that_are_none_of_the_schedule_are_refused(stages):
    with pytest.raises(ValueError, match=r"stages is \[.*\]: at least one of 0 to 2 is needed, in ascending order"):
        TokenPruner(SCHEDULE, learned()).at_stages(stages)


@pytest.mark.parametrize("question_rank", [0, 16])
def test_a_learned_scorer_takes_its_weights_along_and_shares_them(question_rank):
    scorer = learned(question_rank).eval()
    state = torch.get_rng_state()
    part = TokenPruner(SCHEDULE, scorer).at_stages([0, 2]).scorer
    assert torch.equal(torch.get_rng_state(), state)  # what trains next draws the numbers it would have drawn
    assert isinstance(part, scorers.Learned)
    assert (part.stages, part.training, part.neighbours, part.recency) == (2, False, 1, 0.1)
    hidden, positions, lengths = torch.randn(1, 40, 32), torch.arange(40)[None], torch.tensor([40])
    for stage, own in ((0, 0), (1, 2)):
        assert torch.equal(part(stage, hidden, positions, lengths), scorer(own, hidden, positions, lengths))
    expected = {id(value) for name, value in scorer.named_parameters() if name.split(".")[1] != "1"}
    assert {id(value) for value in part.parameters()} == expected


def test_removal_equals_hidden_keys_and_differs_from_the_whole_pruner(tiny_model):
    model = tiny_model("llama", torch.float64)
    pruner = TokenPruner(SCHEDULE, learned().double())
    part = pruner.at_stages([1, 2])
    kept, logits = prune(model, part)
    assert [len(stage[0]) for stage in kept] == [20, 15]
    expected = masked_logits(model, PROMPT, torch.ones_like(PROMPT), (2, 3), kept, prompt=40)
    for row in range(2):
        assert (logits[row] - expected[row, kept[-1][row]]).abs().max() < 1e-9
    # The stage before layer 1 is left out, so that what enters layer 2 is scored by the weights of that stage.
    alone = TokenPruner(PruningSchedule((2,), (0.5,), 2, 0.2, 3, 7), pruner.scorer.at_stages([1]))
    assert torch.equal(prune(model, alone)[0][0], kept[0])


def test_the_oracle_keeps_the_labels_of_its_layers(tiny_model):
    labels = torch.rand(3, 2, 40)
    part = TokenPruner(SCHEDULE, scorers.Saliency(labels)).at_stages([0, 2])
    assert torch.equal(part.scorer.labels, labels[[0, 2]])
    assert prune(tiny_model("llama"), part)[0][-1].shape == (2, 24)


def test_a_rule_without_weights_is_the_same_rule():
    assert TokenPruner(SCHEDULE, scorers.Recent()).at_stages([1]).scorer == scorers.Recent()


def test_it_comes_back_from_disk_with_its_weights_and_its_model(tmp_path, tiny_model):
    model = tiny_model("llama")
    part = TokenPruner(SCHEDULE, learned(), fingerprint(model)).at_stages([0, 2])
    part.save_pretrained(tmp_path)
    back = TokenPruner.from_pretrained(tmp_path)
    assert (back.schedule, back.trained_for) == (part.schedule, fingerprint(model))
    for (name, found), (_, expected) in zip(
        back.scorer.named_parameters(), part.scorer.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    for found, expected in zip(prune(model, back)[0], prune(model, part)[0], strict=True):
        assert torch.equal(found, expected)
