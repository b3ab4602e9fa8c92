"""How training draws the tokens a stage keeps: with noise, so that what a scorer would drop is tried now and then."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch

from sdtp.pruning.selection import select
from sdtp.training.seeding import keyed_generator


class Draw(NamedTuple):
    """What a stage does with the tokens of a prompt.

    Attributes:
        kept: bool [tokens], which of the free ones stay; False at all others.
        margin: [tokens] on the graph of the scores, how far each is above the point where it would be dropped; divided
            by the temperature it is the logit of the relaxed mask. Also of tokens that are not free.
    """

    kept: torch.Tensor
    margin: torch.Tensor


Sampler = Callable[[torch.Tensor, torch.Tensor, int, float, torch.Tensor], Draw]
"""Takes scores [tokens] float32; free bool [tokens], those the stage decides on; how many of these to keep, fewer than
there are; the temperature; and standard Gumbel noise [tokens]."""


def highest(scores: torch.Tensor, free: torch.Tensor, keep: int) -> Draw:
    """The `keep` highest-scored free tokens, as pruning takes them.

    The margin is that to the midpoint between the lowest kept and the highest dropped score.
    """
    value = scores.detach()
    candidates = free.nonzero()[:, 0]
    columns, _ = select(value[candidates][None], torch.zeros_like(candidates, dtype=torch.bool)[None], None, [keep])
    kept = torch.zeros_like(free).index_fill_(0, candidates[columns[0]], True)
    highest_dropped = value[free & ~kept].amax()
    lowest_kept = value[kept].amin() if keep else highest_dropped
    return Draw(kept, scores - (highest_dropped + lowest_kept) / 2)


def gumbel_topk(scores: torch.Tensor, free: torch.Tensor, keep: int, temperature: float, noise: torch.Tensor) -> Draw:
    """The highest of scores with Gumbel noise times the temperature: always as many as the budget says.

    That draws tokens without replacement, with scores over temperature as log-weights (Gumbel top-k, Kool et al. 2019,
    arXiv 1903.06059).
    """
    return highest(scores + temperature * noise, free, keep)


def gumbel_softmax(
    scores: torch.Tensor, free: torch.Tensor, keep: int, temperature: float, noise: torch.Tensor
) -> Draw:
    """Every token by itself: the larger of its keep and drop logits with Gumbel noise (paper §3.2, arXiv 1611.01144).

    With `g` and `g'` standard Gumbel, a token is kept where `keep + g > drop + g'`, and its relaxed mask is

        softmax([keep + g, drop + g'] / T)[0] = sigmoid((keep - drop + g - g') / T).

    Both depend on the score `keep - drop` alone, and `g - g'` has the standard logistic distribution: one number of
    noise a token, of that distribution, is as good as two Gumbel ones, and `P(kept) = sigmoid(keep - drop)`.

    How many tokens are kept varies. Pruning keeps a fixed number, so scores are compared with the level at which
    the expected number is that one: `sum_i sigmoid(score_i - level) = keep` over the free tokens. The level of the
    scores is of no account then, as it is none where pruning ranks them. A loss on the kept fraction, as DynamicViT's
    (arXiv 2106.02034), would teach the scores a level as well, at which the budget holds on average over a data set
    and not in each prompt; it would contend with the squared error to labels, whose mean is 0.
    """
    noise = logistic(noise)
    if not keep:  # no level is high enough
        return highest(scores + noise, free, 0)
    level = _level(scores.detach()[free], keep)
    margin = scores - level + noise
    return Draw(free & (margin.detach() > 0), margin)


def _level(scores: torch.Tensor, expected: int) -> torch.Tensor:
    """Where `sum_i sigmoid(scores_i - level)` is `expected`, by bisection in float64."""
    wide = scores.double()
    # With all scores alike the level is this far below them, so it lies no further than that from some score.
    offset = torch.logit(wide.new_tensor(expected / len(wide)))
    low, high = wide.amin() - offset, wide.amax() - offset
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.sigmoid(wide - middle).sum() > expected
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return ((low + high) / 2).to(scores.dtype)


SAMPLERS: MappingProxyType[str, Sampler] = MappingProxyType(
    {
        "gumbel_topk": gumbel_topk,
        "gumbel_softmax": gumbel_softmax,
    }
)


def gumbel_noise(seed: int, epoch: int, example: str, stage: int, tokens: int) -> torch.Tensor:
    """Standard Gumbel noise [tokens] float32 on the CPU, a function of (seed, epoch, example, stage) alone."""
    generator = keyed_generator(seed, epoch, example, stage)
    uniform = torch.rand(tokens, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return (-(-uniform.log()).log()).float()


def logistic(gumbel: torch.Tensor) -> torch.Tensor:
    """Standard logistic noise from standard Gumbel noise, the quantile of one for that of the other.

    With `x = e^-g`, the quantile of `g` is `u = e^-x`, and that of the logistic distribution `log(u / (1 - u))`.
    """
    x = (-gumbel).exp()
    return -x - (-torch.expm1(-x)).log()
