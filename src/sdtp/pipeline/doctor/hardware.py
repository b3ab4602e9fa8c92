"""Processors, GPUs and their memory, and the attention kernels on them."""

from __future__ import annotations

import os
import warnings
from typing import Any

from sdtp.errors import UserError
from sdtp.host_memory import available_memory
from sdtp.pipeline.devices import visible_gpus
from sdtp.pipeline.doctor.finding import INSTALL, Finding, import_torch, one_line
from sdtp.pipeline.formats import memory

# The default run's largest job peaks at 1.8 GB, and up to one job a core runs at once.
JOB_BYTES = 2 * 2**30


def cuda() -> Finding:
    """Whether torch can use the GPUs that the machine has."""
    torch = import_torch()
    if isinstance(torch, str):
        return Finding("CUDA", "failure", f"torch cannot be imported: {torch}", "install torch anew, for this machine")
    versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = next((f"{name} {version}" for name, version in versions.items() if version), "")
    try:
        gpus = visible_gpus()
    except UserError as error:
        return Finding("CUDA", "failure", str(error), "set CUDA_VISIBLE_DEVICES to GPUs of this machine, or unset it")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return Finding("CUDA", "ok", f"torch is built for {built}, {torch.cuda.device_count()} GPUs can be used")
    if gpus and not built:
        advice = "install a torch built for CUDA to use them"
        return Finding("CUDA", "warning", f"torch is built for the CPU, and the machine has {len(gpus)} GPUs", advice)
    if gpus:
        reason = f": {one_line(told[0].message)}" if told else ""
        found = f"torch is built for {built} and can use none of {len(gpus)} GPUs{reason}"
        return Finding(
            "CUDA", "failure", found, "update the driver (nvidia-smi shows it), or install a torch built for it"
        )
    hidden = " (CUDA_VISIBLE_DEVICES is set)" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    return Finding("CUDA", "ok", f"no GPU{hidden}: the CPU is used; torch is built for {built or 'the CPU'}")


def devices() -> list[Finding]:
    """Processors and memory: of this host, and of every GPU that torch sees."""
    torch = import_torch()
    found = [_host()]
    if not isinstance(torch, str) and torch.cuda.is_available():
        found += [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    return found


def _host() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    free = available_memory()
    if free is None:
        return Finding("CPU", "ok", f"{cores} cores{threads}; free memory is not known on this system")
    found = f"{cores} cores{threads}, {memory(free)} of memory free"
    if free < JOB_BYTES:
        advice = f"a job of the default run needs up to {memory(JOB_BYTES)}: end other programs, give fewer --cores"
        return Finding("CPU", "warning", found, advice)
    return Finding("CPU", "ok", found)


def _gpu(torch: Any, index: int) -> Finding:
    name = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(8, 8, device=f"cuda:{index}", dtype=torch.bfloat16)
        computed = float((ones @ ones).sum())
    except RuntimeError as error:
        advice = "torch has no code for this GPU, or another program holds it: nvidia-smi shows which"
        return Finding(name, "failure", f"{torch.cuda.get_device_name(index)}: {one_line(error)}", advice)
    found = f"{torch.cuda.get_device_name(index)}, {memory(free)} of {memory(total)} free"
    if computed != 512:
        advice = "do not trust results of this GPU: look at `dmesg` and `nvidia-smi -q` for errors"
        return Finding(name, "failure", f"{found}; 8 × 8 ones by 8 × 8 ones add up to {computed:g}, not to 512", advice)
    if free < total / 2:
        return Finding(name, "warning", found, "another program holds memory of it: nvidia-smi shows which")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(name, "warning", f"{found}; no bfloat16", "set model.dtype: float16, bfloat16 is emulated")
    return Finding(name, "ok", found)


def attention() -> Finding:
    """The attention kernels that models can be loaded with."""
    torch = import_torch()
    if isinstance(torch, str):
        return Finding("attention", "failure", "not looked at: torch cannot be imported", "see CUDA")
    try:
        from transformers.utils import is_flash_attn_2_available
    except ImportError as error:
        return Finding("attention", "failure", f"transformers cannot be imported: {one_line(error)}", f"{INSTALL} sdtp")
    kernels = ["sdpa", "eager"]
    if torch.cuda.is_available():
        within = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        kernels[0] = f"sdpa ({', '.join(name for name, enabled in within.items() if enabled)})"
    if is_flash_attn_2_available():
        return Finding("attention", "ok", ", ".join([*kernels, "flash_attention_2"]))
    return Finding("attention", "ok", f"{', '.join(kernels)}; flash_attention_2 is not installed")
