"""The processes that train together, one a device: who does what, and sums over all of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

from sdtp.errors import UserError

# How long a process waits for the others before it gives up. By default it is 10 minutes on GPUs, and the main one may
# need more alone: a resumed run tells the tracker a long learning curve again, and every checkpoint uploads a pruner,
# to a server that may be slow. A process that died is no matter of this: what launched them ends the others.
_PATIENCE = timedelta(hours=6)


class FailedElsewhereError(Exception):
    """Raised on every process but the main one when any of them failed; the main one raises the failure itself."""


class Processes:
    """One of several processes that were launched together (`accelerate launch`, `torchrun`), or the only one.

    The scorers are small and their gradients are summed by one plain call before each update. DistributedDataParallel
    has no place here: it expects one forward for each backward, and the masked model calls a scorer once a stage, from
    inside its own forward.

    Args:
        cpu: whether to compute on the CPU although there may be a GPU.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
        main: whether this is the one that writes, reports and shows progress.
        device: what this process computes on; on CUDA also made the current device.
    """

    def __init__(self, cpu: bool) -> None:
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.main = self.rank == 0
        self.device: torch.device = state.device

    def share(self, items: int, lockstep: bool = False) -> list[tuple[int, bool]]:
        """Which of `items` items this process works on.

        Args:
            items: at least one.
            lockstep: every process gets as many; where they do not divide evenly, some get an item once more.

        Returns:
            Pairs of an item, from 0, and whether its result counts: over all processes every item counts once.
        """
        turns = -(-items // self.count) * self.count if lockstep else items
        return [(turn % items, turn < items) for turn in range(self.rank, turns, self.count)]

    def holds(self, item: int) -> bool:
        """Whether `share` gives this process the item to count."""
        return item % self.count == self.rank

    def add_up(self, values: torch.Tensor) -> None:
        """Replace values, in place, by their sum over the processes; the same bits on each."""
        if self.count > 1:
            distributed.all_reduce(values)

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.count > 1:
            distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return box.item()

    def spread(self, values: torch.Tensor, item: int) -> None:
        """Replace values, in place, by those of the process that holds the item."""
        if self.count > 1:
            distributed.broadcast(values, item % self.count)

    def from_main(self, value: Any) -> Any:
        """What the main process has; tensors in it should be on the CPU."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def from_all(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks; tensors in it should be on the CPU."""
        found = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def together(self, lockstep: bool = False) -> Iterator[None]:
        """Work that each process does without the others: if it fails on one, it ends on all, with one message.

        Args:
            lockstep: the block is not without the others (the model is sharded): a failure in it cannot be shared, and
                ends the process; what launched the processes ends the rest.

        Raises:
            UserError, RuntimeError: on the main process, a failure of its own or another's.
            FailedElsewhereError: on the others.
        """
        if self.count == 1 or lockstep:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = torch.tensor(int(failure is not None), device=self.device)
        distributed.all_reduce(failed)
        if not failed:
            return
        found = self.from_all(_described(failure))
        if not self.main:
            raise FailedElsewhereError from failure
        if failure is not None:
            raise failure
        rank, (expected, text) = next((rank, told) for rank, told in enumerate(found) if told is not None)
        raise UserError(text) if expected else RuntimeError(f"process {rank} of {self.count} failed:\n{text}")


def _described(failure: Exception | None) -> tuple[bool, str] | None:
    """Whether it is an error that a message is enough for, and that message or the traceback; None for no failure."""
    if failure is None:
        return None
    if isinstance(failure, UserError):
        return True, str(failure)
    return False, "".join(traceback.format_exception(failure))
