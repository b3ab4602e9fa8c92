"""What a run of the benchmark checks beside measuring; the first two need CUDA."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_measure import Bench, random_prompt
from transformers import PreTrainedModel

from sdtp.pruning.pruner import TokenPruner

# A caching allocator's blocks may be larger than what was asked for by this much.
PEAK_SLACK_BYTES = 2**20


def checked(what: str, passed: bool | None, detail: str) -> dict[str, str]:
    """A check as it goes into the results; `passed` is None where the machine cannot make it."""
    return {"check": what, "result": {True: "passed", False: "failed", None: "skipped"}[passed], "detail": detail}


def synchronisations(run: Callable[[], Any]) -> list[str]:
    """Where a run waits for the device: `file:line` each time that CUDA's synchronisation debug mode warns.

    Copying numbers from the host's ordinary memory to the device waits too, and is reported.
    """
    run()  # what happens on first use alone is left out
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing CUDA operation" in str(w.message)]


def check_synchronisations(model: PreTrainedModel, pruner: TokenPruner, tokens: int) -> list[dict[str, str]]:
    """A pruned prefill waits for the device as often as the unpruned one, and once more whatever the number of stages.

    The one time is after the last layer, for scores that are no numbers. A padded prefill may wait twice: it reads the
    lengths of its rows.
    """
    prompt = random_prompt(model.config, 2, tokens, model.device)
    mask = torch.ones_like(prompt)
    mask[0, : tokens // 4] = 0
    results = []
    for kind, inputs, allowed in (
        ("unpadded", {"input_ids": prompt[:1]}, 1),
        ("padded", {"input_ids": prompt, "attention_mask": mask}, 2),
    ):
        run = functools.partial(model, **inputs, use_cache=True, logits_to_keep=1)
        with torch.inference_mode():
            unpruned = synchronisations(run)
            with pruner(model):
                pruned = synchronisations(run)
        places = ", ".join(f"{Path(place).name} x{pruned.count(place)}" for place in dict.fromkeys(pruned))
        detail = f"{len(pruned)} pruned ({places or 'none'}), {len(unpruned)} unpruned; {pruner.schedule.stages} stages"
        what = f"at most {allowed} host-device synchronisations more than unpruned, {kind} prefill"
        results.append(checked(what, len(pruned) - len(unpruned) <= allowed, detail))
    return results


def check_peak_memory(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """At each length no peak is above that of a schedule that keeps more, and the smallest is below the unpruned one.

    Two schedules may well share a peak: it is in the layers before the first stage, which see the whole prompt.
    """
    results = []
    for tokens, group in itertools.groupby(rows, key=lambda row: row["prompt_tokens"]):
        peaks = {
            row["keep_ratio"] if row["method"] == "sdtp" else "unpruned": row["peak_memory_bytes"] for row in group
        }
        peaks = {name: peak for name, peak in peaks.items() if peak is not None}
        values = list(peaks.values())
        falls = all(b <= a + PEAK_SLACK_BYTES for a, b in itertools.pairwise(values))
        if "unpruned" in peaks and len(peaks) > 1:
            falls = falls and values[-1] < peaks["unpruned"]
        detail = ", ".join(f"{name}: {peak / 1e9:.3f} GB" for name, peak in peaks.items())
        results.append(checked(f"peak memory falls with the schedule at {tokens} tokens", falls, detail))
    return results


def check_cache(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The KV caches hold as many bytes as the schedule implies."""
    wrong = []
    for row in rows:
        ratio = None if row["method"] == "unpruned" else row["keep_ratio"]
        held, implied = row["kv_cache_bytes"], bench.work[row["prompt_tokens"], ratio].kv_cache_bytes
        if held not in (None, implied):
            wrong.append(f"{row['prompt_tokens']} tokens at {ratio or 'unpruned'}: {held}, not {implied}")
    return checked("KV cache bytes are those the schedule implies", not wrong, "; ".join(wrong) or f"{len(rows)} rows")
