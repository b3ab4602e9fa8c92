"""Times a press of NVIDIA's kvpress against the unpruned model, as `sdtp time-methods` does its methods.

Both run in turn in one process, in the environment of kvpress_evaluate.py: the unpruned model is that of its
transformers. Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpress_evaluate import DTYPES, PRESSES, check_lengths, load, read, removed_share, written

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MEMORY_ROUNDS = 3  # as in `sdtp time-methods`


def main() -> None:
    """Time the press that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--name", required=True, help="the model's name, for the rows")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto: bfloat16 on CUDA")
    parser.add_argument("--attention", default="sdpa", help="attention kernel, as transformers names it")
    parser.add_argument("--examples", required=True, type=Path, metavar="JSONL", help="made by `sdtp budgets --timed`")
    parser.add_argument("--press", required=True, choices=PRESSES, help="what compresses the cache")
    parser.add_argument("--keep-ratio", required=True, type=float, help="of the budgets, for the rows")
    parser.add_argument("--new-tokens", required=True, type=int, help="tokens that every pass generates")
    parser.add_argument("--repeats", required=True, type=int, help="timed rounds")
    parser.add_argument("--warmup", required=True, type=int, help="rounds before them, at least one")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="timings to write")
    args = parser.parse_args()
    examples = read(args.examples)
    check_lengths(examples, args.press)
    model = load(args.model, args.dtype, args.attention)
    rounds = args.warmup, args.repeats
    rows = [row for example in examples for row in measure(model, example, args.press, args.new_tokens, *rounds)]
    result = {
        "method": f"kvpress-{args.press}",
        "keep_ratio": args.keep_ratio,
        "model": args.name,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attention,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "kvpress")},
        "stages": [],
        "warmup": args.warmup,
        "rows": rows,
    }
    written(args.output, json.dumps(result, indent=1, allow_nan=False) + "\n")


def measure(
    model: PreTrainedModel, example: dict[str, Any], press: str, new_tokens: int, warmup: int, repeats: int
) -> list[dict[str, Any]]:
    """The unpruned row and the press's, in the form of `sdtp time-methods`, but for the operations.

    Args:
        model: eval mode, unhooked.
        example: a row of `sdtp budgets --timed`.
        press: name of a class of kvpress.
        new_tokens: tokens that every pass generates, >= 1.
        warmup, repeats: rounds, in each of which both run once; rounds that measure memory alone come after them.
    """
    import torch
    from tqdm.auto import tqdm

    prompt = torch.tensor([example["prompt_ids"]], device=model.device)
    arms = {"unpruned": None, f"kvpress-{press}": (press, example["entries"])}
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    cached: dict[str, int] = {}
    for _ in tqdm(range(warmup + repeats), desc=f"timing {press}", unit="round", mininterval=10):
        for arm, pressed in arms.items():
            prefill_s, end_to_end_s, cached[arm] = timed_pass(model, prompt, pressed, new_tokens)
            times[arm].append((prefill_s, end_to_end_s))
    peaks: dict[str, list[int | None]] = {arm: [] for arm in arms}
    for _ in range(MEMORY_ROUNDS):
        for arm, pressed in arms.items():
            with peak_memory(model.device) as peak:
                timed_pass(model, prompt, pressed, 1)
            peaks[arm].append(peak.get("bytes"))
    return [
        {
            "method": arm,
            "prompt_tokens": prompt.shape[1],
            "new_tokens": new_tokens,
            "prefill_s": [prefill for prefill, _ in passes[warmup:]],
            "decode_s": [total - prefill if new_tokens > 1 else None for prefill, total in passes[warmup:]],
            "end_to_end_s": [total for _, total in passes[warmup:]],
            "cold_s": passes[0][0],
            "kv_cache_bytes": cached[arm],
            "peak_memory_bytes": peaks[arm],
        }
        for arm, passes in times.items()
    ]


def timed_pass(
    model: PreTrainedModel, prompt: torch.Tensor, pressed: tuple[str, int] | None, new_tokens: int
) -> tuple[float, float, int]:
    """Prefill a prompt, then decode greedily; nothing stops it early.

    Args:
        model: eval mode, unhooked.
        prompt: LongTensor [1, tokens].
        pressed: the press and the entries that each KV head of each layer keeps; None for the whole cache.
        new_tokens: tokens to generate, >= 1.

    Returns:
        Seconds to the first token and to the last, and bytes of keys and values after prefill.

    Raises:
        RuntimeError: the press left another number of entries.
    """
    import kvpress  # type: ignore[import-not-found]  # of the other environment
    import torch
    from transformers import DynamicCache

    tokens, cache = prompt.shape[1], DynamicCache(config=model.config)
    context: Any = contextlib.nullcontext()
    if pressed is not None:
        context = getattr(kvpress, pressed[0])(compression_ratio=removed_share(tokens, pressed[1]))(model)
    with torch.inference_mode():
        with context:
            start = clock(model.device)
            output = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
            first = clock(model.device)
        entries = tokens if pressed is None else pressed[1]
        found = {cache.get_seq_length(layer) for layer in range(len(cache))}
        if found != {entries}:
            raise RuntimeError(f"the layers hold {sorted(found)} entries, {entries} of {tokens} were asked for")
        layers: list[Any] = list(cache.layers)
        storages = [tensor.untyped_storage() for layer in layers for tensor in (layer.keys, layer.values)]
        cached = sum(size for _, size in {(one.data_ptr(), one.nbytes()) for one in storages})
        begin = clock(model.device)
        for at in range(tokens, tokens + new_tokens - 1):
            positions = torch.tensor([[at]], device=model.device)
            output = model(input_ids=token, past_key_values=cache, position_ids=positions, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        end = clock(model.device)
    return first - start, first - start + (end - begin if new_tokens > 1 else 0.0), cached


def clock(device: torch.device) -> float:
    """Seconds since an arbitrary start, once queued work is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Fills in `bytes`, the most memory held at once inside: allocated on a GPU, else resident (Linux, glibc only)."""
    import torch

    peak: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    except (OSError, AttributeError):
        yield peak
        return
    yield peak
    status = Path("/proc/self/status").read_text().splitlines()
    peak["bytes"] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def device_name(device: torch.device) -> str:
    """What the numbers were measured on."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
