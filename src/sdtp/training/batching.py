"""Which examples run together, and when: batches of similar length, and those that need most memory first."""

from __future__ import annotations

from collections.abc import Sequence

# Padding costs what tokens do. A tenth keeps batches apart that would save less by their size than they lose to it.
MOST_PADDING = 0.1


def length_batches(
    lengths: Sequence[int], batch_tokens: int, most_padding: float = MOST_PADDING
) -> list[tuple[int, ...]]:
    """Every example in one batch, a function of the lengths alone.

    Longest first; which batch needs most memory is another matter, see `demanding_first`.

    Args:
        lengths: tokens of each example, at least one.
        batch_tokens: most tokens of a batch, padding included (its examples times its longest); an example that has
            more runs alone.
        most_padding: largest fraction of a batch's tokens that may be padding; 0 for batches of one length.

    Returns:
        The examples' places in `lengths`, batch by batch.
    """
    found: list[tuple[int, ...]] = []
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        tokens = (len(batch) + 1) * lengths[batch[0]] if batch else 0
        if batch and (tokens > batch_tokens or tokens - real - lengths[index] > most_padding * tokens):
            found.append(tuple(batch))
            batch, real = [], 0
        batch.append(index)
        real += lengths[index]
    return [*found, tuple(batch)] if batch else found


def demanding_first(
    batches: Sequence[tuple[int, ...]], lengths: Sequence[int], responses: Sequence[int]
) -> list[tuple[int, ...]]:
    """The batches of `length_batches`, those that may need most memory before all others, whose order stays.

    What does not fit into memory then fails at the start and not after hours. What layers keep grows with a batch's
    tokens, padding included, and what attention takes with the longest example; logits, with the response tokens.

    Args:
        batches: of examples' places in `lengths` and `responses`, each batch's longest example first.
        lengths: tokens of each example.
        responses: response tokens of each example.
    """
    if not batches:
        return []
    padded = [len(batch) * lengths[batch[0]] for batch in batches]
    longest = [lengths[batch[0]] for batch in batches]
    predicted = [sum(responses[index] for index in batch) for batch in batches]
    most = [values.index(max(values)) for values in (padded, longest, predicted)]
    return [batches[place] for place in dict.fromkeys([*most, *range(len(batches))])]
