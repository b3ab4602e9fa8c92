"""Every baseline against every clause that a scorer has to keep to: a scorer in `BASELINES` is in this matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.pruning import scorers, store
from sdtp.pruning.scorer import Scorer, StageView
from tests.pruning.scorer_contract import (
    CONTRACT,
    comes_back_from_disk,
    rows_choose_alone,
    runs_repeat,
    says_what_it_looks_at,
    scores_are_numbers,
)

Clause = Callable[[Scorer, PreTrainedModel, Path], None]


@pytest.mark.parametrize("clause", CONTRACT, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("scorer", scorers.BASELINES, ids=lambda cls: cls.__name__)
def test_scorer_keeps_to_its_contract(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, scorer: type[Scorer], clause: Clause
) -> None:
    clause(scorer(), tiny_model(), tmp_path)


@dataclasses.dataclass(frozen=True)
class CountsPadding:
    """Its mean takes the columns of padding in."""

    question_conditioned: ClassVar[bool] = True

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        return (view.hidden - view.hidden.mean(1, keepdim=True)).norm(dim=-1)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Its scores are of a generator's state."""

    question_conditioned: ClassVar[bool] = False

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        return torch.rand(view.positions.shape)


@dataclasses.dataclass(frozen=True)
class LooksAhead:
    """It compares with the prompt's last token, and denies it."""

    question_conditioned: ClassVar[bool] = False

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        last = view.hidden.gather(1, view.positions.argmax(1)[:, None, None].expand(-1, 1, view.hidden.shape[-1]))
        return (view.hidden * last).sum(-1)


@dataclasses.dataclass(frozen=True)
class InTheModelsDtype:
    """Its squares overflow where the model computes in half precision."""

    question_conditioned: ClassVar[bool] = False

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        return view.hidden.norm(dim=-1)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Nothing is worth more than anything else."""

    question_conditioned: ClassVar[bool] = False

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        return torch.ones(view.positions.shape)


@pytest.mark.parametrize(
    ("scorer", "clause"),
    [
        (CountsPadding(), rows_choose_alone),
        (Draws(), runs_repeat),
        (LooksAhead(), says_what_it_looks_at),
        (InTheModelsDtype(), scores_are_numbers),
        (Constant(), scores_are_numbers),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_clauses_notice(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, scorer: Scorer, clause: Clause
) -> None:
    with pytest.raises(AssertionError):
        clause(scorer, tiny_model(), tmp_path)


def test_scorer_that_the_store_does_not_know_does_not_come_back(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Constant cannot be saved: accepted are Learned, Random, Recent"):
        comes_back_from_disk(Constant(), tiny_model(), tmp_path)
    assert set(store._PLAIN.values()) == set(scorers.BASELINES)
