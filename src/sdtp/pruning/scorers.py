"""Who decides which tokens matter: the learned MLP of the paper and the baselines, behind one small protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class StageView:
    """What a scorer may look at when a stage decides.

    Attributes:
        stage: 0-based stage.
        layer: the decoder layer the hidden states are about to enter.
        hidden: [batch, tokens, hidden], the states of the tokens still present.
        positions: LongTensor [batch, tokens], each token's index among its row's real prompt tokens (0...N-1); -1 where
            the row is padding.
        prompt_lengths: LongTensor [batch], `N` of each row.
        last_query_attention: computes [batch, tokens] float32, the attention that the last prompt token paid in layer
            `layer - 1`, averaged over heads; under `LastQuery` alone, which has these layers checked and watched.
    """

    stage: int
    layer: int
    hidden: torch.Tensor
    positions: torch.Tensor
    prompt_lengths: torch.Tensor
    last_query_attention: Callable[[], torch.Tensor]


_Integers = TypeVar("_Integers", int, torch.Tensor)


class Scorer(Protocol):
    """Scores the tokens entering a stage; the higher, the more worth keeping."""

    @property
    def question_conditioned(self) -> bool:
        """Whether a token's score depends on what follows it in the prompt.

        Then the survivors of a document are right for the one question it was read with.
        """
        ...

    def score(self, view: StageView) -> torch.Tensor:
        """Scores [batch, tokens], float32; values at padding are ignored."""
        ...


def rms_normalised(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., hidden] divided by their root mean square, float32: what `Learned` reads."""
    return torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)


# The end of a prompt, where its question stands: so many tokens are compared with every other.
_QUESTION_TOKENS = 16
# Channels of one head of that comparison.
_HEAD = 8
# On each side; far beyond what is of use.
_MOST_NEIGHBOURS = 64


class Learned(nn.Module):
    """A learned scorer: before each stage an MLP maps what is known of a token to keep and drop logits.

    With a token's hidden state alone this is the paper's scorer (π in R^{N×2}, §3.2). Two more inputs can be had:

    - `position`: where the token stands. A hidden state has little notion of how far it is from the end of the prompt.
    - `question_rank`: what the end of the prompt asks for. Low-rank keys of the token are compared with queries of the
      last 16 tokens present; each head's greatest product is an input.

    The state is divided by its root mean square first: residual streams grow by orders of magnitude over the layers,
    and a few channels of the first tokens hold values in the thousands.

    What the MLP says of a token is an estimate of its saliency, which knows each token by itself. Removal does not work
    token by token: what is left of a passage is worth more whole than in fragments, and the latest tokens are worth
    more than their saliency. So two steps lead from the estimates to the scores that decide:

    - `neighbours`: an estimate is averaged with those of so many tokens present on each side.
    - `recency`: so many times `log(N / d)` is added, `d` the token's distance from the prompt's end, 1 for the last.

    Args:
        hidden_size: width of the model's hidden states.
        stages: number of stages, each with its own weights.
        width: hidden units of each MLP.
        position: whether it sees positions.
        question_rank: channels of the keys and queries, in heads of 8; 0 leaves the comparison out.
        neighbours: tokens on each side that share an estimate; 0 takes each by itself.
        recency: weight of recency, in the units of an estimate, whose standard deviation is about 1; 0 leaves it out.

    Attributes:
        question_conditioned: see `Scorer`.

    Raises:
        ValueError: a `question_rank` that is not a multiple of 8, `neighbours` outside 0...64, or a `recency`
            that is negative or not finite.
    """

    def __init__(
        self,
        hidden_size: int,
        stages: int,
        width: int = 128,
        position: bool = False,
        question_rank: int = 0,
        neighbours: int = 0,
        recency: float = 0.0,
    ) -> None:
        super().__init__()
        if question_rank < 0 or question_rank % _HEAD:
            raise ValueError(f"question_rank is {question_rank}: a multiple of {_HEAD} is accepted, or 0")
        if not 0 <= neighbours <= _MOST_NEIGHBOURS:
            raise ValueError(f"neighbours is {neighbours}: 0 to {_MOST_NEIGHBOURS} is accepted")
        if not 0 <= recency < math.inf:
            raise ValueError(f"recency is {recency}: a number of 0 or more is accepted")
        self.hidden_size = hidden_size
        self.width = width
        self.position = position
        self.question_rank = question_rank
        self.neighbours = neighbours
        self.recency = recency
        self.question_conditioned = question_rank > 0
        inputs = hidden_size + 3 * position + question_rank // _HEAD
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, 2)) for _ in range(stages)
        )
        compared = range(stages if question_rank else 0)
        self.keys = nn.ModuleList(nn.Linear(hidden_size, question_rank, bias=False) for _ in compared)
        self.queries = nn.ModuleList(nn.Linear(hidden_size, question_rank, bias=False) for _ in compared)

    @property
    def stages(self) -> int:
        """Number of stages the scorer has weights for."""
        return len(self.mlps)

    def multiply_adds(self, tokens: int) -> int:
        """Multiply-adds that a stage takes to score so many tokens of one row."""
        inputs = self.hidden_size + 3 * self.position + self.question_rank // _HEAD
        asking = min(_QUESTION_TOKENS, tokens)
        compared = self.question_rank * ((tokens + asking) * self.hidden_size + tokens * asking)
        weighted = tokens * (2 * self.neighbours + (self.recency > 0))
        return tokens * (inputs + 2) * self.width + compared + weighted

    def forward(
        self,
        stage: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        prompt_lengths: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The scores that decide: `scores` of `estimates`, whose arguments these are; [batch, tokens] float32."""
        return self.scores(
            self.estimates(stage, hidden, positions, prompt_lengths, present), positions, prompt_lengths, present
        )

    def estimates(
        self,
        stage: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        prompt_lengths: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep-logit minus drop-logit of every token by itself, what labels are compared with.

        Args:
            stage: whose weights score.
            hidden: [batch, tokens, hidden], the states entering the stage, in any order-preserving selection of tokens.
            positions: LongTensor [batch, tokens], index among the row's real prompt tokens; -1 at padding.
            prompt_lengths: LongTensor [batch], `N` of each row.
            present: bool [batch, tokens], the tokens that entered the stage; None if all but padding did. Training
                scores removed ones as well, which must not change the scores of those that are left.

        Returns:
            [batch, tokens] float32.
        """
        mlp = self.mlps[stage]
        with torch.autocast(hidden.device.type, enabled=False):  # scores in bfloat16 would tie
            normed = rms_normalised(hidden).to(next(mlp.parameters()).dtype)
            inputs = [normed]
            if self.position:
                inputs.append(_places(positions, prompt_lengths).to(normed))
            if self.question_rank:
                inputs.append(self._matches(stage, normed, *_latest(positions, present)))
            keep, drop = mlp(torch.cat(inputs, dim=-1) if len(inputs) > 1 else normed).float().unbind(-1)
        return keep - drop

    def scores(
        self,
        estimates: torch.Tensor,
        positions: torch.Tensor,
        prompt_lengths: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What estimates come to where tokens are removed: shared between neighbours, and with recency.

        Args:
            estimates: [batch, tokens] float32, what `estimates` gave.
            positions, prompt_lengths, present: as it took them.

        Returns:
            [batch, tokens] float32; of a token that is not present, what it would get if it alone were brought back.
        """
        scores = estimates
        if self.neighbours:
            scores = _shared(scores, positions >= 0 if present is None else present & (positions >= 0), self.neighbours)
        if self.recency:
            lengths = prompt_lengths.to(positions.device)[:, None]
            scores = scores + self.recency * (lengths.log() - (lengths - positions).log())
        return scores

    def _matches(self, stage: int, normed: torch.Tensor, latest: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads]: how well each token's keys match the queries of the last tokens present.

        Args:
            stage: whose weights compare.
            normed: [batch, tokens, hidden].
            latest, valid: see `_latest`.
        """
        queries = self.queries[stage](_states_at(normed, latest)).unflatten(
            -1, (-1, _HEAD)
        )  # [batch, asking, heads, 8]
        keys = self.keys[stage](normed).unflatten(-1, (-1, _HEAD))  # [batch, tokens, heads, 8]
        products = torch.einsum("bahc,bthc->bath", queries, keys) * _HEAD**-0.5
        return products.masked_fill(~valid[..., None, None], -torch.inf).amax(1)

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`. The stage's weights move to the device of the states it scores, and stay there."""
        with torch.inference_mode(False):  # weights moved inside it could never be trained again
            for modules in (self.mlps, self.keys, self.queries):
                if len(modules):
                    modules[view.stage].to(view.hidden.device)
        scores: torch.Tensor = self(view.stage, view.hidden, view.positions, view.prompt_lengths)
        return scores


def _latest(positions: torch.Tensor, present: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns [batch, asking] of each row's last tokens present, and bool [batch, asking] where there are any."""
    there = positions if present is None else positions.masked_fill(~present, -1)
    values, columns = there.topk(min(_QUESTION_TOKENS, positions.shape[1]), dim=1)
    return columns, values >= 0


def _states_at(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[batch, columns, hidden] of states [batch, tokens, hidden]."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def _shared(values: torch.Tensor, present: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The mean of each token's value and of those of the tokens present next to it, fewer at the ends.

    Args:
        values: [batch, tokens] float32.
        present: bool [batch, tokens]. The neighbours of a token that is not are those it would have.
        neighbours: on each side.
    """
    tokens = values.shape[1]
    before = present.cumsum(1) - present.long()  # present tokens before each
    number = present.sum(1, keepdim=True)
    # The values of those present moved together; the others' go to a column that nothing reads.
    together = values.new_zeros(len(values), tokens + 1).scatter(1, before.where(present, tokens), values)
    total, count = values, torch.ones_like(values)
    for offset in (*range(-neighbours, 0), *range(neighbours)):
        column = before + offset + (present.long() if offset >= 0 else 0)
        there = (column >= 0) & (column < number)
        total = total + together.gather(1, column.clamp(0, tokens)).where(there, 0)
        count = count + there
    return total / count


def _places(positions: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, 3] float32 in [0, 1] up to 64K tokens: share of the prompt before a token, and the logarithms of
    its distances from both ends, which grow slowly beyond the lengths of training."""
    last = (prompt_lengths[:, None] - 1).to(positions.device)
    since, until = positions.clamp_min(0), (last - positions).clamp_min(0)
    return torch.stack([since / last.clamp_min(1), (1 + since).log2() / 16, (1 + until).log2() / 16], dim=-1)


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

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`.

        Raises:
            ValueError: the labels are of another batch size or of fewer tokens than the prompt.
        """
        labels = self.labels[view.stage].to(view.positions.device, torch.float32)
        if labels.shape[0] != view.positions.shape[0] or labels.shape[1] <= int(view.positions.max()):
            raise ValueError(
                f"saliency labels are of shape {tuple(self.labels.shape)} [stages, batch, tokens]: this prompt needs "
                f"{view.positions.shape[0]} rows and at least {int(view.positions.max()) + 1} tokens"
            )
        return labels.gather(1, view.positions.clamp_min(0))
