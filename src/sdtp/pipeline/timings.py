"""What a timing job writes of each arm: its times, its memory, and what it was measured on."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from sdtp.evaluation import latency
from sdtp.evaluation.memory import cache_bytes, peak_memory
from sdtp.pipeline.config import ModelSettings
from sdtp.pipeline.files import write_atomically

# Passes of an arm in which peak memory is measured.
MEMORY_ROUNDS = 3


def measured_on(model: PreTrainedModel, settings: ModelSettings) -> dict[str, Any]:
    """What the numbers are of: model, device, number format, attention kernel, versions."""
    return {
        "model": settings.source.ref,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": settings.attention,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def times(method: str, prompt_tokens: int, samples: latency.Samples) -> dict[str, Any]:
    """The timings of one arm as they go into its row."""
    return {
        "method": method,
        "prompt_tokens": prompt_tokens,
        "new_tokens": samples.warm[0].new_tokens,
        "prefill_s": [timing.prefill_s for timing in samples.warm],
        "decode_s": [timing.decode_s for timing in samples.warm],
        "end_to_end_s": [timing.end_to_end_s for timing in samples.warm],
        "cold_s": samples.cold.prefill_s,
    }


@contextmanager
def memory(model: PreTrainedModel) -> Iterator[dict[str, int | None]]:
    """Fills in the peak of the block, and the bytes of the KV cache after the block's first forward, its prefill."""
    measured: dict[str, int | None] = {}

    def after_prefill(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not measured:
            measured["kv_cache_bytes"] = cache_bytes(output.cache)

    hook = model.register_forward_hook(after_prefill)
    try:
        with peak_memory(model.device) as peak:
            yield measured
    finally:
        hook.remove()
    measured["peak_memory_bytes"] = peak.bytes


def peaks(
    model: PreTrainedModel, arms: Mapping[str, Callable[[], object]], rounds: int = MEMORY_ROUNDS
) -> dict[str, dict[str, Any]]:
    """Memory of each arm: `peak_memory_bytes`, one number a round in which all run in turn, and `kv_cache_bytes`.

    Rounds of their own, after the timed ones: an arm's very first pass also pays for what stays with the process, and a
    pass in which memory is measured has to get it back from the system first.

    Args:
        model: what the arms run.
        arms: one pass of each, by name, that begins with its prefill.
        rounds: how often.
    """
    measured: dict[str, dict[str, Any]] = {name: {"peak_memory_bytes": []} for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            with memory(model) as held:
                run()
            measured[name]["peak_memory_bytes"].append(held["peak_memory_bytes"])
            measured[name]["kv_cache_bytes"] = held["kv_cache_bytes"]
    return measured


def device_name(device: torch.device) -> str:
    """What the numbers were measured on, as a reader would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def write_timings(path: Path, result: Mapping[str, Any]) -> None:
    """Write what a timing step found, atomically, as JSON for people to look into too."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
