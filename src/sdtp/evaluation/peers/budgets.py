"""How many tokens or cache entries a peer keeps: fractions, and what a pruning schedule keeps of the same prompt.

A budget maps a number of tokens to the number that is kept of them. Whatever it says, at least one is kept and at most
all are: see `kept`.
"""

from __future__ import annotations

from collections.abc import Callable

from sdtp.pruning.schedule import PruningSchedule

# Number of tokens -> how many of them to keep.
Budget = Callable[[int], int]


def kept(budget: Budget, tokens: int) -> int:
    """What is kept of so many tokens (>= 1): the budget's number, at least 1 and at most all."""
    return min(tokens, max(1, budget(tokens)))


def fraction(keep: float) -> Budget:
    """`round(keep * tokens)`; `keep` is the fraction kept, not the one removed.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep is {keep}: the fraction to keep must be in (0, 1]")
    return lambda tokens: round(keep * tokens)


def final_survivors(schedule: PruningSchedule) -> Budget:
    """The tokens that a schedule's last stage leaves of a prompt; all of it where there is no stage."""
    return lambda tokens: [tokens, *schedule.surviving(tokens)][-1]


def mean_entries(schedule: PruningSchedule, num_layers: int) -> Budget:
    """The entries a layer's cache holds of a prompt under a schedule, on average over the model's layers, rounded.

    A cache that holds so many in every layer is as large as the pruned one, to half an entry a layer.

    Raises:
        ValueError: the schedule prunes at a layer the model does not have.
    """
    schedule.check_fits(num_layers)
    return lambda tokens: round(sum(schedule.layer_lengths(tokens, num_layers)) / num_layers)


def entries_beside(schedule: PruningSchedule, num_layers: int, full_layers: int, propagated: Budget) -> Budget:
    """The entries each of a model's first layers holds, so that the whole cache is as large as a schedule's.

    Args:
        schedule: whose cache is matched.
        num_layers: decoder layers of the model.
        full_layers: the first layers, which run on the whole prompt and hold what this budget says.
        propagated: the tokens that reach the other layers, which hold them all.

    Returns:
        Budget of the prompt's tokens. Where the propagated tokens alone take more than the schedule's cache, or the
        first layers could not take so many, it is as close as can be: 1 or all.

    Raises:
        ValueError: the schedule prunes at a layer the model does not have, or there are no or too many first layers.
    """
    schedule.check_fits(num_layers)
    if not 1 <= full_layers <= num_layers:
        raise ValueError(f"full_layers is {full_layers}: 1 to {num_layers} is accepted, the model's layers")

    def entries(tokens: int) -> int:
        total = sum(schedule.layer_lengths(tokens, num_layers))
        later = (num_layers - full_layers) * kept(propagated, tokens)
        return min(tokens, max(1, round((total - later) / full_layers)))

    return entries
