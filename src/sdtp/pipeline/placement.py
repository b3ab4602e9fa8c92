"""The name of a placement: on one device, split by layers, shared by tensor parallelism, or once on each of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from sdtp.errors import UserError

T = TypeVar("T")

ACCEPTED = "one, split-K, tensor-K or replicas-K, with K from 2 to 64"


@dataclass(frozen=True)
class Placement:
    """A placement of the model.

    Attributes:
        kind: `one` device; `split`, each device has some of the layers; `tensor`, each has a part of every layer;
            `replicas`, each has all of the model and answers its share of the requests.
        devices: how many. On a machine without GPUs a device is a process with its share of the cores.
    """

    kind: Literal["one", "split", "tensor", "replicas"]
    devices: int

    @classmethod
    def parse(cls, name: str) -> Self:
        """From its name: `one`, `tensor-2`. Raises UserError for any other."""
        found = re.fullmatch(r"(one)|(split|tensor|replicas)-([1-9]\d?)", name)
        devices = int(found[3] or 1) if found else 0
        if found is None or not (found[1] or 2 <= devices <= 64):
            raise UserError(f"serving.placements: {name!r} is not known; accepted: {ACCEPTED}")
        kind: Any = found[1] or found[2]
        return cls(kind, devices)

    @property
    def processes(self) -> int:
        """How many work together; layers that are split are run by one."""
        return self.devices if self.kind in ("tensor", "replicas") else 1

    def share(self, batches: Sequence[T], rank: int) -> Sequence[T]:
        """What the process of a rank answers of all batches: every one, or a replica's share."""
        return batches[rank :: self.devices] if self.kind == "replicas" else batches
