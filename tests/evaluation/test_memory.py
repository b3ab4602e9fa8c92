"""Peak memory of a block and bytes of a cache."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sdtp.evaluation.memory import cache_bytes, peak_memory
from sdtp.pruning import flops, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs procfs")
def test_peak_is_of_this_block_alone() -> None:
    torch.ones(200 * MIB // 4).sum()  # an earlier arm's peak
    with peak_memory(CPU) as small:
        torch.ones(50 * MIB // 4).sum()
    with peak_memory(CPU) as large:
        torch.ones(150 * MIB // 4).sum()
    assert small.bytes is not None
    assert large.bytes is not None
    assert 80 * MIB < large.bytes - small.bytes < 120 * MIB


# Freeing a large block teaches glibc to keep the smaller ones on its heap; the last of them pins what lies below.
FREEING = """
import resource

import torch
from sdtp.evaluation.memory import give_back_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

{first}
large = torch.ones(30 << 20, dtype=torch.uint8)
del large
before = resident()
blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
last = blocks[-1]
del blocks
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back_whatever_is_still_in_use() -> None:
    def left(first: str) -> int:
        code = FREEING.format(first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert left("give_back_freed_memory()") < 10 * MIB
    assert left("") > 100 * MIB


def test_unsupported_system_gives_none_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), peak_memory(CPU, process=tmp_path / "absent") as peak:
        pass
    assert peak.bytes is None
    assert "peak memory is not measured" in caplog.text
    assert "clear_refs" in caplog.text


def test_status_without_the_mark_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name: python\nVmRSS: 5 kB\n")
    with pytest.raises(RuntimeError, match="no line VmHWM"), peak_memory(CPU, process=tmp_path):
        pass


def test_reads_kilobytes_of_1024(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmPeak: 9 kB\nVmHWM:\t    1000 kB\n")
    with peak_memory(CPU, process=tmp_path) as peak:
        pass
    assert peak.bytes == 1_024_000
    assert (tmp_path / "clear_refs").read_text() == "5"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_the_tensors(tiny_model: Callable[..., PreTrainedModel], dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    prompt = torch.arange(3, 43).unsqueeze(0)
    schedule = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)
    size = 2 * 2 * 8 * dtype.itemsize  # keys and values, 2 KV heads of 8
    assert cache_bytes(model(input_ids=prompt, use_cache=True).cache) == 4 * 40 * size
    with TokenPruner(schedule, scorers.Recent())(model):
        pruned = cache_bytes(model(input_ids=prompt, use_cache=True).cache)
    assert pruned == (40 + 20 + 20 + 10) * size
    assert pruned == flops.cache_bytes(model.config, 40, schedule, dtype.itemsize)


def test_cache_bytes_count_what_a_view_keeps_alive(tiny_model: Callable[..., PreTrainedModel]) -> None:
    cache = tiny_model()(input_ids=torch.arange(3, 43).unsqueeze(0), use_cache=True).cache
    whole = cache_bytes(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]
    assert cache_bytes(cache) == whole


def test_empty_cache_holds_nothing(tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert cache_bytes(DynamicCache(config=tiny_model().config)) == 0
