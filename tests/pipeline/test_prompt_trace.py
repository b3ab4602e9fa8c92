"""A trace's scores are the scorer's own, and what was kept are the best of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.evaluation.generation import generate_batch
from sdtp.pipeline.prompt_trace import Watched, trace_prompt

# The last token alone is protected; of the others the best-scored ones are kept.
SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=0, local=0.0, min_local=1)
IDS = list(range(3, 43))


@pytest.mark.parametrize("kind", ["Random", "Recent", "HiddenNorm", "LastQuery", "Learned"])
def test_scores_explain_what_is_kept(kind: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    scorer = scorers.Learned(32, stages=2, width=4) if kind == "Learned" else getattr(scorers, kind)()
    pruner, own_class = TokenPruner(SCHEDULE, scorer), type(scorer)
    found = trace_prompt(model, pruner, IDS)
    with pruner(model) as trace, torch.inference_mode():
        model(input_ids=torch.tensor([IDS]), logits_to_keep=1)
    assert found.kept == [stage[0].tolist() for stage in trace.kept]
    assert [len(kept) for kept in found.kept] == [24, 12]
    present = list(range(40))
    for kept, scores in zip(found.kept, found.scores, strict=True):
        assert list(scores) == present  # of all that entered the stage, and no other
        best = sorted(present[:-1], key=lambda position: (-scores[position], position))
        assert [*sorted(best[: len(kept) - 1]), 39] == kept
        assert len(set(scores.values())) > len(present) // 2
        present = kept
    assert type(scorer) is own_class  # the pruner's own scorer stays as it was


def test_scores_by_hand(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    found = trace_prompt(model, TokenPruner(SCHEDULE, scorers.HiddenNorm()), IDS)
    with torch.inference_mode():
        entering = model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states[1]
    assert [found.scores[0][position] for position in range(40)] == pytest.approx(entering[0].norm(dim=-1).tolist())


def test_a_stage_that_removes_nothing_has_no_scores(tiny_model: Callable[..., PreTrainedModel]) -> None:
    schedule = PruningSchedule((1, 2, 3), (0.5, 0.5, 0.25), sinks=0, local=0.0, min_local=1)
    found = trace_prompt(tiny_model(), TokenPruner(schedule, scorers.Recent()), IDS)
    assert [len(scores) for scores in found.scores] == [40, 0, 20]
    assert found.kept == [list(range(20, 40)), list(range(20, 40)), list(range(30, 40))]


def test_rows_of_a_batch_have_the_scores_that_each_has_alone(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, pruner = tiny_model(dtype=torch.float64), TokenPruner(SCHEDULE, scorers.HiddenNorm())
    prompts = [IDS, IDS[5:25]]
    watched = Watched(pruner)
    replies = generate_batch(model, watched.pruner, prompts, 3, 0)
    assert replies == generate_batch(model, pruner, prompts, 3, 0)
    for row, ids in enumerate(prompts):
        alone = trace_prompt(model, pruner, ids)
        assert replies[row].kept == alone.kept
        for together, expected in zip(watched.scores(row), alone.scores, strict=True):
            assert together == pytest.approx(expected, rel=1e-6)  # and of the same positions


def test_another_models_pruner_is_refused(tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="hidden size 16"):
        trace_prompt(tiny_model(), TokenPruner(SCHEDULE, scorers.Learned(16, 2, 4)), IDS)
