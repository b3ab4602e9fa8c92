"""What nvidia-smi measures of the GPUs a step leased, and of no others, while the step runs.

MLflow's own system metrics look at every GPU of the machine, and so would tell each of two jobs of the other's.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import fmean

from sdtp.errors import UserError
from sdtp.pipeline import operations
from sdtp.pipeline.devices import PATIENCE, visible_gpus
from sdtp.pipeline.operations import Point

logger = logging.getLogger(__name__)

SECONDS = 10.0
# Of a long step fewer, evenly: a curve needs no more.
MOST_SAMPLES = 500
# What nvidia-smi is asked for, what it is called here, and what one of its units is in that of the name.
QUANTITIES = {
    "utilization.gpu": ("utilization_percent", 1.0),
    "memory.used": ("memory_bytes", 2.0**20),
    "power.draw": ("power_watts", 1.0),
}


@dataclass(frozen=True)
class Sample:
    """What one look at one GPU found.

    Attributes:
        gpu: its place among the leased ones, from 0.
        at: milliseconds since 1970.
        values: by the names of `QUANTITIES`; without what this GPU does not measure.
    """

    gpu: int
    at: int
    values: dict[str, float]


class GpuMeter:
    """Looks at GPUs while a step runs; `gpus` are their UUIDs, see `leased`; `seconds` pass between two looks."""

    def __init__(self, gpus: Sequence[str], seconds: float = SECONDS) -> None:
        self._places = {uuid: place for place, uuid in enumerate(gpus)}
        self._seconds = seconds
        self._samples: list[Sample] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Takes samples until the block ends, the first at once."""
        if not self._places:
            yield
            return
        over = threading.Event()
        looking = threading.Thread(target=self._look, args=(over,), daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join(PATIENCE)

    def points(self) -> Iterator[Point]:
        """The curves `gpu/0/power_watts` and so on, and of each GPU the mean use and power and the most memory that all
        programs on it held: `gpu/0/power_watts_mean`, `gpu/0/memory_bytes_max`."""
        for gpu in self._places.values():
            samples = [sample for sample in self._samples if sample.gpu == gpu]
            stride = -(-len(samples) // MOST_SAMPLES) or 1
            for name, _ in QUANTITIES.values():
                curve = [(sample.values[name], sample.at) for sample in samples if name in sample.values]
                for step, (value, at) in enumerate(curve[::stride]):
                    yield f"gpu/{gpu}/{name}", value, at, step
                if curve:
                    values = [value for value, _ in curve]
                    kind, summary = ("max", max(values)) if name == "memory_bytes" else ("mean", fmean(values))
                    yield f"gpu/{gpu}/{name}_{kind}", summary, curve[-1][1], 0

    def _look(self, over: threading.Event) -> None:
        # A process each time: one that goes on by itself would outlive a step that is killed.
        query = f"--query-gpu={','.join(['uuid', *QUANTITIES])}"
        command = ["nvidia-smi", f"--id={','.join(self._places)}", query, "--format=csv,noheader,nounits"]
        while True:
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
            except (OSError, subprocess.TimeoutExpired) as error:
                logger.debug("the GPUs are not looked at any more: %s", error)
                return
            self._take(said)
            if over.wait(self._seconds):
                return

    def _take(self, said: str) -> None:
        """Of lines `UUID, value, ...` in the order of `QUANTITIES`; what is not measured is [N/A] or the like."""
        for line in said.splitlines():
            uuid, *fields = (part.strip() for part in line.split(","))
            if uuid not in self._places or len(fields) != len(QUANTITIES):
                continue
            values = {}
            for field, (name, unit) in zip(fields, QUANTITIES.values(), strict=True):
                with suppress(ValueError):
                    values[name] = float(field) * unit
            self._samples.append(Sample(self._places[uuid], operations.now(), values))


def leased() -> list[str]:
    """UUIDs of the GPUs that CUDA_VISIBLE_DEVICES names, which `sdtp lease` and Slurm set; none where nothing is set.

    Parts of a GPU are left out: nvidia-smi measures nothing of them.
    """
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return []
    try:
        return [uuid for uuid in visible_gpus() if not uuid.startswith("MIG-")]
    except UserError as error:  # the lease refuses it, and a step without one is called by hand
        logger.debug("no GPU is looked at: %s", error)
        return []
