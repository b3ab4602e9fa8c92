"""The learned scorer: the paper's MLP, what ours sees besides, and how its estimates come to decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from sdtp.pruning.scorer import StageView


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
    more than their saliency. So two steps can lead from the estimates to the scores that decide:

    - `neighbours`: an estimate is averaged with those of so many tokens present on each side, with weights that fall
      linearly with the distance: 4, 3, 2, 1 for three.
    - `recency`: so many times `log(N / d)` is added, `d` the token's distance from the prompt's end, 1 for the last.

    Args:
        hidden_size: width of the model's hidden states.
        stages: number of stages, each with its own weights.
        width: hidden units of each MLP.
        position: whether it sees positions.
        question_rank: channels of the keys and queries, in heads of 8; 0 leaves the comparison out.
        neighbours: tokens on each side that share in an estimate; 0 takes each by itself.
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
            nn.Sequential(_linear(inputs, width), nn.GELU(), _linear(width, 2)) for _ in range(stages)
        )
        compared = range(stages if question_rank else 0)
        self.keys = nn.ModuleList(_linear(hidden_size, question_rank, bias=False) for _ in compared)
        self.queries = nn.ModuleList(_linear(hidden_size, question_rank, bias=False) for _ in compared)

    @property
    def stages(self) -> int:
        """Number of stages the scorer has weights for."""
        return len(self.mlps)

    def at_stages(self, stages: Sequence[int]) -> Learned:
        """A scorer of some of the stages; their weights are this scorer's own, not copies.

        Args:
            stages: which of the stages, 0-based, in the new scorer's order.
        """
        part = Learned(
            self.hidden_size, 0, self.width, self.position, self.question_rank, self.neighbours, self.recency
        )
        for own, chosen in ((self.mlps, part.mlps), (self.keys, part.keys), (self.queries, part.queries)):
            if len(own):  # there are no keys and queries where nothing is compared
                chosen.extend(own[stage] for stage in stages)
        return part.train(self.training)

    def multiply_adds(self, tokens: int) -> int:
        """Multiply-adds that a stage takes to score so many tokens of one row."""
        inputs = self.hidden_size + 3 * self.position + self.question_rank // _HEAD
        asking = min(_QUESTION_TOKENS, tokens)
        compared = self.question_rank * ((tokens + asking) * self.hidden_size + tokens * asking)
        weighted = tokens * ((2 * self.neighbours + 1) * (self.neighbours > 0) + (self.recency > 0))
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
                there = positions if present is None else positions.masked_fill(~present, -1)
                inputs.append(self._matches(stage, normed, there))
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
            scores = scores + self.recency * (lengths.float().log() - (lengths - positions).float().log())
        return scores

    def _matches(self, stage: int, normed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads]: how well each token's keys match the queries of the last tokens present.

        Args:
            stage: whose weights compare.
            normed: [batch, tokens, hidden].
            positions: LongTensor [batch, tokens], -1 where nothing is present.
        """
        latest = positions.topk(min(_QUESTION_TOKENS, positions.shape[1]), dim=1)
        asking = normed.gather(1, latest.indices[..., None].expand(-1, -1, normed.shape[-1]))
        queries = self.queries[stage](asking).unflatten(-1, (-1, _HEAD))  # [batch, asking, heads, 8]
        keys = self.keys[stage](normed).unflatten(-1, (-1, _HEAD))  # [batch, tokens, heads, 8]
        products = torch.einsum("bahc,bthc->bath", queries, keys) * _HEAD**-0.5
        return products.masked_fill((latest.values < 0)[..., None, None], -torch.inf).amax(1)

    def score(self, view: StageView) -> torch.Tensor:
        """See `Scorer.score`. The stage's weights move to the device of the states it scores, and stay there."""
        with torch.inference_mode(False):  # weights moved inside it could never be trained again
            for modules in (self.mlps, self.keys, self.queries):
                if len(modules):
                    modules[view.stage].to(view.hidden.device)
        scores: torch.Tensor = self(view.stage, view.hidden, view.positions, view.prompt_lengths)
        return scores


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    # Whatever the default dtype: people set it to bfloat16 to load their models, and scores in it would tie.
    return nn.Linear(inputs, outputs, bias, dtype=torch.float32)


def _shared(values: torch.Tensor, present: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The weighted mean of each token's value and of those of the tokens present next to it, fewer at the ends.

    The value itself has the weight `neighbours + 1`, that of the token next to it `neighbours`, and so on to 1.

    Args:
        values: [batch, tokens] float32.
        present: bool [batch, tokens]. The neighbours of a token that is not are those it would have.
        neighbours: on each side.
    """
    tokens = values.shape[1]
    before = present.cumsum(1) - present.long()  # present tokens before each
    # Moved together, those present stand between empty columns that the windows of the first and the last reach into;
    # the others go to one more, which is cut off.
    empty, cut_off = neighbours, tokens + 2 * neighbours
    column = (before + empty).where(present, cut_off)[:, None].expand(-1, 2, -1)
    values_and_ones = torch.stack([values, torch.ones_like(values)], dim=1)
    together = values.new_zeros(len(values), 2, cut_off + 1).scatter(2, column, values_and_ones)[..., :cut_off]
    # Few operations, each over all tokens: on a GPU a stage's scoring is as long as the launches of its kernels.
    windows = together.unfold(2, neighbours, 1)  # [batch, 2, first column, columns]
    nearer = torch.arange(1.0, neighbours + 1, device=values.device)  # the weights of a window on the left
    on_the_left = (windows * nearer).sum(-1).gather(2, before[:, None].expand(-1, 2, -1))
    first_on_the_right = (before + present.long() + empty)[:, None].expand(-1, 2, -1)
    on_the_right = (windows * nearer.flip(0)).sum(-1).gather(2, first_on_the_right)
    total, weight = ((neighbours + 1) * values_and_ones + on_the_left + on_the_right).unbind(1)
    return total / weight


def _places(positions: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, 3] float32 in [0, 1] up to 64K tokens: share of the prompt before a token, and the logarithms of
    its distances from both ends, which grow slowly beyond the lengths of training."""
    last = (prompt_lengths[:, None] - 1).to(positions.device)
    since, until = positions.clamp_min(0).float(), (last - positions).clamp_min(0).float()
    return torch.stack([since / last.clamp_min(1).float(), (1 + since).log2() / 16, (1 + until).log2() / 16], dim=-1)
