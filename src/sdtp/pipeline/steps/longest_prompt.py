"""Finds the longest prompt that fits into a memory limit, unpruned and at each keep ratio."""

import argparse
import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.latency import Context, Stopwatch, timed_pass
from sdtp.evaluation.memory import give_back_freed_memory, peak_memory
from sdtp.evaluation.serving import longest
from sdtp.pipeline.benchmark_text import request_prompts
from sdtp.pipeline.config import Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import sha256_file
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import load_model, read_manifest
from sdtp.pipeline.pruners import at_ratio, read_pruner
from sdtp.pipeline.step import step
from sdtp.pipeline.timings import measured_on, write_timings

# The CPU shares its memory with everything else, so that there is no such thing as all of it.
CPU_LIMIT = 3


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp longest-prompt", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning and serving settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--text", required=True, type=Path, metavar="JSON", help="the benchmark's text")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="measurements to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    serving, device = settings.serving, choose_device()
    with step("longest-prompt", args, outputs=[args.output]) as log:
        lengths = lengths_to_try(serving.length_step, serving.new_tokens, read_manifest(args.model)["context_length"])
        log.dataset("benchmark", args.text, sha256_file(args.text))
        model = load_model(args.model, settings.model.dtype, settings.model.attention, device)
        limit = serving.memory_limit or default_limit(model)
        arms: dict[tuple[str, float], Context] = {("unpruned", 1.0): contextlib.nullcontext}
        trained, layers = read_pruner(args.pruner), model.config.num_hidden_layers
        for ratio in settings.pruning.keep_ratios:
            pruner = at_ratio(trained, args.pruner, settings.pruning, layers, ratio)
            arms["sdtp", ratio] = functools.partial(pruner, model)
        [ids] = request_prompts(args.text, lengths[-1], 1)
        rows = []
        give_back_freed_memory()  # or the arms' order would count
        for (method, ratio), context in tqdm(arms.items(), desc="looking for the longest prompt", unit="arm"):
            found = find(model, context, torch.tensor([ids], device=device), lengths, serving.new_tokens, limit)
            rows.append({"method": method, "keep_ratio": ratio, **found})
            if found["longest"] is not None:
                log.metric(f"longest_prompt/{method}/{ratio}", found["longest"])
        limits = {"memory_limit": limit, "tokens_at_most": lengths[-1], "length_step": serving.length_step}
        result = {**measured_on(model, settings.model), "new_tokens": serving.new_tokens, **limits, "rows": rows}
        write_timings(args.output, result)
        log.artifact(args.output)


def lengths_to_try(stride: int, new_tokens: int, context: int | None) -> list[int]:
    """Multiples of `stride` and, last, the longest prompt that leaves room for the new tokens.

    Raises:
        UserError: the model states no context, or one without room for a prompt.
    """
    if context is None:
        raise UserError("serving: the model states no context length, so that there is no longest prompt to try")
    check_context({"serving.new_tokens": new_tokens, "a prompt": 1}, context)
    most = context - new_tokens
    return [*range(stride, most, stride), most]


def default_limit(model: PreTrainedModel) -> int | None:
    """Bytes where the configuration names none: on a GPU None, all it has; on the CPU some multiple of the weights."""
    if model.device.type == "cuda":
        return None
    return CPU_LIMIT * sum(tensor.nbytes for tensor in model.parameters())


def find(
    model: PreTrainedModel,
    context: Context,
    prompt: torch.Tensor,
    lengths: list[int],
    new_tokens: int,
    limit: int | None,
) -> dict[str, Any]:
    """The longest beginning of a prompt that fits, and the peak memory in bytes of each that was tried.

    Args:
        model: eval mode, unhooked.
        context: what it runs in.
        prompt: LongTensor [1, tokens] on its device.
        lengths: tokens to try, ascending.
        new_tokens: generated after the prompt, >= 1.
        limit: most bytes; None for what the GPU has.

    Raises:
        UserError: this system does not tell how much memory a process had.
    """
    tried: dict[int, int | None] = {}

    def fits(length: int) -> bool:
        tried[length] = None
        with contextlib.suppress(torch.OutOfMemoryError):
            with peak_memory(model.device) as peak, context():
                timed_pass(model, prompt[:, :length], new_tokens, Stopwatch(model.device))
            if peak.bytes is None:
                raise UserError("serving.memory_limit: this system does not tell how much memory a process has had")
            tried[length] = peak.bytes
            return limit is None or peak.bytes <= limit
        return False

    return {"longest": longest(fits, lengths), "peaks": dict(sorted(tried.items()))}
