"""From scores to survivors: which tokens a stage keeps, row by row, in one pass over the batch."""

from __future__ import annotations

import torch

from sdtp.pruning.schedule import PruningSchedule


def select(
    scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor | None, budgets: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens a stage keeps: the protected ones and the best-scored others, in their original order.

    Ranking is a stable descending sort, so ties go to the earlier token and runs repeat exactly.

    Args:
        scores: [batch, tokens] float32, the higher the more worth keeping.
        protected: [batch, tokens] bool, True where a token must stay (never True at padding).
        valid: [batch, tokens] bool, True at real tokens; None if there is no padding.
        budgets: tokens to keep, one number a row, at least its protected tokens and at most its real ones.

    Returns:
        columns: LongTensor [batch, max(budgets)], the kept columns, ascending, right-aligned.
        valid: [batch, max(budgets)] bool, False at the padding left of shorter rows; None if no row is shorter.
    """
    tokens = scores.shape[1]
    # Two infinities would tie with protected tokens and padding: real scores stay finite.
    limit = torch.finfo(scores.dtype).max
    ranked = scores.nan_to_num(nan=-limit, posinf=limit, neginf=-limit).masked_fill(protected, torch.inf)
    if valid is not None:
        ranked = ranked.masked_fill(~valid, -torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    width = max(budgets)
    if valid is None and min(budgets) == width:
        return order[:, :width].sort(dim=1).values, None
    budget = numbers(budgets, scores.device)[:, None]
    within = torch.arange(tokens, device=scores.device) < budget
    keep = torch.zeros_like(protected).scatter(1, order, within.expand_as(protected))
    columns = keep.to(torch.int8).sort(dim=1, stable=True).indices[:, tokens - width :]
    if min(budgets) == width:
        return columns, None
    return columns, torch.arange(width, device=scores.device) >= width - budget


def protected_tokens(
    schedule: PruningSchedule,
    positions: torch.Tensor,
    valid: torch.Tensor | None,
    present: list[int],
    marked: torch.Tensor | None,
) -> torch.Tensor:
    """True at the tokens a stage may not remove: the sinks, the tail, and those the caller marked.

    Args:
        schedule: says how many sinks and how long a tail.
        positions: LongTensor [batch, tokens], index among the row's real prompt tokens; -1 at padding.
        valid: [batch, tokens] bool, True at real tokens; None if there is no padding.
        present: real tokens in each row.
        marked: [batch, tokens] bool of the caller's `protect=`, or None.

    Returns:
        [batch, tokens] bool.
    """
    tail_start = [n - schedule.protected_tail(n) for n in present]
    if valid is None:
        order = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    else:
        order = valid.cumsum(1) - 1
    protected = (positions < schedule.sinks) | (order >= numbers(tail_start, positions.device)[:, None])
    if marked is not None:
        protected = protected | marked
    return protected if valid is None else protected & valid


def numbers(values: list[int], device: torch.device) -> torch.Tensor:
    """LongTensor [len(values)] on a device, without making the host wait for it, as `torch.tensor` would."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], device=device)
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def take(tensor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows of a [batch or 1, tokens, ...] tensor at columns [batch, kept]: -> [batch, kept, ...].

    A table of one row stays one row for a batch of one and is shared by the rows of a larger batch.
    """
    batch, kept = columns.shape
    if batch == 1:
        return tensor.index_select(1, columns[0])
    if tensor.shape[0] == 1:
        return tensor[0].index_select(0, columns.reshape(-1)).unflatten(0, (batch, kept))
    # index_select copies whole rows; gather would move the hidden dimension number by number.
    flat = columns + torch.arange(batch, device=columns.device)[:, None] * tensor.shape[1]
    return tensor.flatten(0, 1).index_select(0, flat.reshape(-1)).unflatten(0, (batch, kept))
