"""Who decides which tokens matter: the learned MLP of the paper and the baselines, behind one small protocol."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeVar

import torch

from sdtp.pruning.learned import Learned
from sdtp.pruning.scorer import Scorer, StageView

__all__ = [
    "BASELINES",
    "HiddenNorm",
    "LastQuery",
    "Learned",
    "Random",
    "Recent",
    "Saliency",
    "Scorer",
    "StageView",
]

_Integers = TypeVar("_Integers", int, torch.Tensor)


@dataclasses.dataclass(frozen=True)
class Random:
    """A score that depends on (seed, stage, original position) alone, so rows, beams and batches agree."""

    question_conditioned: ClassVar[bool] = False

    seed: int = 0

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`; uniform in [0, 1)."""
        # A counter-based hash (the finaliser of splitmix, cut to 31 bits so that products stay inside int64): no
        # generator state, hence the same number for a position in any batch, beam or device.
        key = _mix((self.seed & 0x7FFFFFFF) * 1_000_003 + view.stage * 7919 + 12345)
        bits = _mix(_mix(view.positions + 1) ^ key)
        return (bits >> 7).to(torch.float32) / 2.0**24  # as many bits as float32 holds, so that 1 is never reached


def _mix(x: _Integers) -> _Integers:
    """Scramble non-negative integers to 31 bits: an int or an int64 tensor, elementwise."""
    x = x & 0x7FFFFFFF
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * multiplier) & 0x7FFFFFFF
    return x ^ (x >> 15)


@dataclasses.dataclass(frozen=True)
class Recent:
    """Keeps the sinks (by the schedule) and the latest tokens, as StreamingLLM (arXiv 2309.17453)."""

    question_conditioned: ClassVar[bool] = False

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`; the original position."""
        return view.positions.to(torch.float32)


@dataclasses.dataclass(frozen=True)
class HiddenNorm:
    """Keeps the tokens whose hidden state is longest."""

    question_conditioned: ClassVar[bool] = False

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`; the L2 norm of the state."""
        return view.hidden.float().norm(dim=-1)


@dataclasses.dataclass(frozen=True)
class LastQuery:
    """Keeps what the last prompt token attends to in the layer before (LazyLLM, arXiv 2407.14057; FastV)."""

    question_conditioned: ClassVar[bool] = True

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`; mean over heads of the attention probability."""
        return view.last_query_attention()


@dataclasses.dataclass(frozen=True)
class Saliency:
    """The oracle: saliency of this very prompt, computed beforehand by a forward and a backward of the unpruned model.

    Attributes:
        labels: [stages, batch, N] saliency of every prompt token by original position; rows shorter than N padded at
            the end with anything.
    """

    question_conditioned: ClassVar[bool] = True  # labels are those of one response

    labels: torch.Tensor

    @property
    def stages(self) -> int:
        """Number of stages there are labels for."""
        return self.labels.shape[0]

    def check(self, rows: int, tokens: int) -> None:
        """Raise ValueError if the labels are of another batch size or of fewer tokens than a prompt."""
        if self.labels.ndim != 3 or self.labels.shape[1] != rows or self.labels.shape[2] < tokens:
            raise ValueError(
                f"saliency labels are of shape {tuple(self.labels.shape)} [stages, batch, tokens]: this prompt needs "
                f"{rows} rows and at least {tokens} tokens"
            )

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`.

        Raises:
            ValueError: see `check`.
        """
        self.check(view.positions.shape[0], int(view.positions.max()) + 1)
        labels = self.labels[view.stage].to(view.positions.device, torch.float32)
        return labels.gather(1, view.positions.clamp_min(0))


# Those that learn nothing and are told nothing of the prompt: each can be saved, and is a method of the workflow under
# its name in small letters. Every one of them goes through `tests/pruning/test_every_scorer.py`.
BASELINES: tuple[type[Scorer], ...] = (Random, Recent, HiddenNorm, LastQuery)
