"""The attention that keys receive, and the entries chosen by it: arithmetic on one layer's queries and keys."""

from __future__ import annotations

import torch

from sdtp.pruning.selection import select

_BLOCK = 256  # queries at a time: scores of a whole prompt's at once would be tokens x tokens


def received_attention(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention probability that each key receives: summed over queries, averaged over the query heads that share it.

    Args:
        queries: [KV heads, query heads per KV head, queries, head_dim], rotated, of the last tokens.
        keys: [KV heads, tokens, head_dim], rotated, of all tokens; each query sees those up to its own.
        scaling: of their products.

    Returns:
        [KV heads, tokens] float32. All of it sums to the number of queries in each row.
    """
    tokens = keys.shape[1]
    first = tokens - queries.shape[2]
    with torch.autocast(keys.device.type, enabled=False):  # sums in bfloat16 would tie
        keys = keys.float()
        received = keys.new_zeros(keys.shape[:2])
        for start in range(0, queries.shape[2], _BLOCK):
            block = queries[:, :, start : start + _BLOCK].float()
            seen = first + start + block.shape[2]  # keys that the block's last query sees
            logits = torch.einsum("kgqd,knd->kgqn", block, keys[:, :seen]) * scaling
            later = torch.ones(block.shape[2], seen, dtype=torch.bool, device=keys.device).triu(first + start + 1)
            received[:, :seen] += logits.masked_fill(later, -torch.inf).softmax(-1).sum(2).mean(1)
    return received


def strongest(scores: torch.Tensor, latest: int, keep: int) -> torch.Tensor:
    """The columns each row keeps: its latest ones, and those of the others that score best; ties go to the earlier.

    Args:
        scores: [rows, tokens] float32.
        latest: how many of the last columns are kept whatever they score, at most `keep`.
        keep: columns to keep, 1 to all.

    Returns:
        LongTensor [rows, keep], ascending.
    """
    rows, tokens = scores.shape
    protected = torch.arange(tokens, device=scores.device) >= tokens - latest
    return select(scores, protected.expand(rows, tokens), None, [keep] * rows)[0]


def pooled(scores: torch.Tensor, kernel: int) -> torch.Tensor:
    """Each score averaged with those around it, beyond the ends with zeros.

    Args:
        scores: [rows, tokens].
        kernel: tokens averaged over, odd.
    """
    return torch.nn.functional.avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]
