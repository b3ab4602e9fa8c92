"""Peak memory of one arm and the bytes of its KV cache."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

logger = logging.getLogger(__name__)

PROCESS = Path("/proc/self")
# mallopt(3): blocks of at least so many bytes are mappings of their own; without it glibc raises that up to 32 MiB.
_M_MMAP_THRESHOLD, _MAPPED = -3, 64 * 1024


class Peak:
    """What `peak_memory` fills in: `bytes` is None until its block ends, and after it where the system cannot tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device, process: Path = PROCESS) -> Iterator[Peak]:
    """Measure the most memory held at once inside the block, model weights included; a time taken in it is a cold one.

    On CUDA the allocator's peak on `device`, reset first. On the CPU the process's peak resident set, interpreter and
    libraries included: freed memory is handed back and the kernel's high-water mark reset first (Linux only).

    Args:
        device: where the block computes.
        process: the process's folder in procfs.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    try:
        _reset_high_water_mark(process)
    except (OSError, AttributeError) as error:
        logger.warning("peak memory is not measured: %s", error)
        yield peak
        return
    yield peak
    peak.bytes = _high_water_mark(process)


def give_back_freed_memory() -> None:
    """From now on this process gives a freed tensor back to the system at once, not to a heap with holes.

    What is resident on the CPU is then what is in use, whatever ran before; `peak_memory` of a block that follows
    others in the same process counts their holes otherwise. Allocating becomes slower: nothing is to be timed after
    it. Nothing happens where the C library is not glibc, and nothing is needed on a GPU.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def _reset_high_water_mark(process: Path) -> None:
    """Give freed heap back to the system, then let VmHWM start over from what is resident now."""
    ctypes.CDLL(None).malloc_trim(0)  # AttributeError where the C library is not glibc
    (process / "clear_refs").write_text("5")


def _high_water_mark(process: Path) -> int:
    """VmHWM in bytes.

    Raises:
        RuntimeError: the status file has no such line.
    """
    for line in (process / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024  # the file counts in kB of 1024 bytes
    raise RuntimeError(f"{process / 'status'} has no line VmHWM")


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values a cache holds.

    Whole storages are counted, each once: a view into a longer tensor keeps all of it alive.
    """
    storages = {}
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):
            for tensor in (layer.keys, layer.values):
                if tensor is not None:  # a layer no token reached yet has none
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
