"""What every scorer has to keep to, whatever it looks at: `CONTRACT` is the list, one function a clause."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorer import Scorer, StageView
from tests.pruning.reference import masked_logits

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
LENGTHS = (40, 29, 17)  # tokens of the padded batch's rows


class Watched:
    """Another scorer, whose views and answers are kept."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.question_conditioned = scorer.question_conditioned
        self.seen: list[tuple[StageView, torch.Tensor]] = []

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        scores = self.scorer.score(view)
        self.seen.append((view, scores))
        return scores


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [rows, longest] of left-padded rows."""
    longest = max(LENGTHS)
    ids = torch.randint(3, 128, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(3))
    return ids, torch.stack([torch.arange(longest) >= longest - n for n in LENGTHS]).long()


def _kept(model: PreTrainedModel, scorer: Scorer, ids: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor]:
    with TokenPruner(SCHEDULE, scorer)(model) as trace, torch.no_grad():
        model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))
    return list(trace.kept)


def rows_choose_alone(scorer: Scorer, model: PreTrainedModel, folder: Path) -> None:
    """A row of a padded batch keeps what it keeps alone; padding never counts."""
    ids, real = _batch()
    together = _kept(model, scorer, ids, real)
    for row, n in enumerate(LENGTHS):
        alone = _kept(model, scorer, ids[row : row + 1, -n:], torch.ones(1, n, dtype=torch.long))
        for stage, kept in enumerate(together):
            assert [p for p in kept[row].tolist() if p >= 0] == alone[stage][0].tolist(), (stage, row)


def runs_repeat(scorer: Scorer, model: PreTrainedModel, folder: Path) -> None:
    """The same prompt keeps the same tokens, however often it is asked."""
    first, again = _kept(model, scorer, *_batch()), _kept(model, scorer, *_batch())
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def removal_is_masking(scorer: Scorer, model: PreTrainedModel, folder: Path) -> None:
    """The logits after generating equal those of the whole prompt with the removed tokens hidden as keys."""
    ids, real = _batch()
    with TokenPruner(SCHEDULE, scorer)(model) as trace, torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=real,
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    everything = torch.cat([real, torch.ones(len(LENGTHS), 3, dtype=real.dtype)], dim=1)
    expected = masked_logits(model, out.sequences, everything, SCHEDULE.layers, trace.kept, prompt=ids.shape[1])
    for step, logits in enumerate(out.logits):
        assert (logits - expected[:, ids.shape[1] - 1 + step]).abs().max().item() <= 1e-5


def comes_back_from_disk(scorer: Scorer, model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` and `from_pretrained` give a pruner that keeps the same tokens."""
    TokenPruner(SCHEDULE, scorer).save_pretrained(folder / "pruner")
    back = TokenPruner.from_pretrained(folder / "pruner")
    assert type(back.scorer) is type(scorer)
    for one, other in zip(_kept(model, scorer, *_batch()), _kept(model, back.scorer, *_batch()), strict=True):
        assert torch.equal(one, other)


def scores_are_numbers(scorer: Scorer, model: PreTrainedModel, folder: Path) -> None:
    """`score` gives float32 [batch, tokens], finite at every real token, not all one number, of states of any size."""
    if type(scorer).__name__ == "LastQuery":  # is handed its attention by the pruner, in float32, and nothing of a view
        return
    watched = Watched(scorer)
    _kept(model, watched, *_batch())
    for view, scores in watched.seen:
        real = view.positions >= 0
        assert scores.dtype == torch.float32
        assert scores.shape == view.positions.shape
        assert scores[real].isfinite().all()
        assert scores[real].unique().numel() > 1
    view = watched.seen[0][0]
    huge = torch.full_like(view.hidden, math.sqrt(torch.finfo(torch.bfloat16).max) / 100).to(torch.bfloat16)
    large = StageView(view.stage, view.layer, huge, view.positions, view.prompt_lengths, view.last_query_attention)
    scores = scorer.score(large)
    assert scores.dtype == torch.float32
    assert scores[view.positions >= 0].isfinite().all()


def says_what_it_looks_at(scorer: Scorer, model: PreTrainedModel, folder: Path) -> None:
    """Where it says that it does not look at what follows a token, another question changes no token's score."""
    if scorer.question_conditioned:
        return
    ids = _batch()[0][:1]
    other = ids.clone()
    other[:, 30:] = ids[:, 30:].flip(1)
    assert not torch.equal(ids, other)
    real = torch.ones_like(ids)
    seen = []
    for prompt in (ids, other):
        watched = Watched(scorer)
        _kept(model, watched, prompt, real)
        seen.append(watched.seen[0][1][:, :30])
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)


CONTRACT: tuple[Callable[[Scorer, PreTrainedModel, Path], None], ...] = (
    rows_choose_alone,
    runs_repeat,
    removal_is_masking,
    comes_back_from_disk,
    scores_are_numbers,
    says_what_it_looks_at,
)
