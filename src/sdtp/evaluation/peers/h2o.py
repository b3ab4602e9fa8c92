"""H2O (arXiv 2306.14048): a head keeps the tokens that the whole prompt attended to most, and the latest ones."""

from __future__ import annotations

import torch


class H2O:
    """Scores entries by the attention summed over all queries of the prompt; half of what is kept is the latest.

    Heads choose for themselves; query heads that share a KV head choose together, by their mean. The paper goes on
    evicting an entry a step while it decodes; here the prompt is compressed once, after prefill, and what is generated
    stays. The sum favours early tokens, which more queries see.
    """

    @property
    def queries(self) -> None:
        """See `compression.Rule.queries`: all."""

    def latest(self, keep: int) -> int:
        """See `compression.Rule.latest`."""
        return (keep + 1) // 2

    def scores(self, received: torch.Tensor, latest: int) -> torch.Tensor:
        """See `compression.Rule.scores`."""
        return received
