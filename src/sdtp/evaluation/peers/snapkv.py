"""SnapKV (arXiv 2404.14469): a head keeps the tokens that the end of the prompt attends to, and that end."""

from __future__ import annotations

import dataclasses

import torch

from sdtp.evaluation.peers.received import pooled


@dataclasses.dataclass(frozen=True)
class SnapKV:
    """Scores entries by the attention of the last `window` queries, averaged over neighbours; §4 of the paper.

    Heads choose for themselves; query heads that share a KV head choose together, by their mean. The window's own
    entries are kept, as in the paper, where the entries kept are more than the window. With fewer, which the paper
    leaves open, the latest half of them is.

    Attributes:
        window: queries at the end of the prompt whose attention is read, >= 1.
        kernel: tokens that a score is averaged over, odd.

    Raises:
        ValueError: a window below 1, or a kernel that is not odd.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}: at least 1 query is needed")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}: an odd number of tokens is needed")

    @property
    def queries(self) -> int:
        """See `compression.Rule.queries`."""
        return self.window

    def latest(self, keep: int) -> int:
        """See `compression.Rule.latest`."""
        return self.window if keep > self.window else (keep + 1) // 2

    def scores(self, received: torch.Tensor, latest: int) -> torch.Tensor:
        """See `compression.Rule.scores`."""
        before = received.shape[1] - latest
        # Those kept anyway are not averaged over: their attention is of few queries.
        return torch.cat([pooled(received[:, :before], self.kernel), received[:, before:]], dim=1)
