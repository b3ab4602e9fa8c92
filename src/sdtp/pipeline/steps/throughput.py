"""Times many requests, a fixed number at a time, on one placement of the model: pruned, unpruned, and on one device."""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.latency import Context, Stopwatch, Timing, interleave
from sdtp.evaluation.serving import answer
from sdtp.pipeline.benchmark_text import request_prompts
from sdtp.pipeline.config import Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import sha256_file
from sdtp.pipeline.launch import end_with_launcher, launch, launched
from sdtp.pipeline.limits import check_serving
from sdtp.pipeline.models import choose_dtype, load_config, read_manifest
from sdtp.pipeline.placement import Placement
from sdtp.pipeline.placements import place, refusal
from sdtp.pipeline.pruners import at_ratio, read_pruner
from sdtp.pipeline.step import step
from sdtp.pipeline.timings import measured_on, times, write_timings
from sdtp.pruning.pruner import TokenPruner
from sdtp.training.processes import FailedElsewhereError, Processes


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp throughput", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning, benchmark, serving settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--text", required=True, type=Path, metavar="JSON", help="the benchmark's text")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--placement", required=True, help="one, split-K, tensor-K or replicas-K")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="measurements to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings, placement = Settings.from_json(args.settings), Placement.parse(args.placement)
    refused = refusal(placement, load_config(args.model), torch.cuda.device_count())
    if refused is None and placement.processes > 1 and not launched():
        launch(placement.processes, sys.argv[1:])
        return
    if launched():
        end_with_launcher()
    # Before anything is put on a GPU: it makes this process's the current one.
    group = Processes(cpu=choose_device().type == "cpu")
    if not group.main:
        with contextlib.suppress(FailedElsewhereError):  # the main process says what failed, and fails
            _measured(args, settings, placement, group)
        return
    with step("throughput", args, outputs=[args.output], wildcards={"placement": args.placement}, times=True) as log:
        check_serving(settings.serving, read_manifest(args.model)["context_length"])
        log.dataset("benchmark", args.text, sha256_file(args.text))
        result = {"placement": args.placement, "devices": placement.devices, "not_run": refused, "rows": []}
        if refused is None:
            result |= _measured(args, settings, placement, group)
        write_timings(args.output, result)
        log.artifact(args.output)
        log.metric("rows", len(result["rows"]))


def _measured(args: argparse.Namespace, settings: Settings, placement: Placement, group: Processes) -> dict[str, Any]:
    """What every process does; the main one's answer counts."""
    with group.together():
        dtype = str(choose_dtype(settings.model.dtype, group.device)).removeprefix("torch.")
        requests = _batches(args.text, settings, placement, group.device)
    with group.together(lockstep=placement.kind == "tensor"):
        model, alone = place(placement, args.model, dtype, settings.model.attention, group)
    layers = model.config.num_hidden_layers
    with group.together():
        trained = read_pruner(args.pruner)
        pruners = {
            ratio: at_ratio(trained, args.pruner, settings.pruning, layers, ratio)
            for ratio in settings.pruning.keep_ratios
        }
    rows = [row for batches in requests for row in measure(model, alone, pruners, batches, settings, placement, group)]
    return {**measured_on(model, settings.model), "warmup": settings.benchmark.warmup, "rows": rows}


def _batches(text: Path, settings: Settings, placement: Placement, device: torch.device) -> list[list[torch.Tensor]]:
    """For each batch size all requests, LongTensors [batch, tokens] on the device."""
    serving, replicas = settings.serving, placement.devices if placement.kind == "replicas" else 1
    for size in serving.batch_sizes:
        if serving.requests % (size * replicas):
            raise UserError(
                f"serving.requests: {serving.requests} requests in batches of {size} cannot be shared evenly by "
                f"{replicas} replicas; a multiple of {size * replicas} is accepted"
            )
    prompts = torch.tensor(request_prompts(text, serving.prompt_tokens, serving.requests), device=device)
    return [list(prompts.split(size)) for size in serving.batch_sizes]


def measure(
    model: PreTrainedModel,
    alone: PreTrainedModel | None,
    pruners: Mapping[float, TokenPruner],
    batches: Sequence[torch.Tensor],
    settings: Settings,
    placement: Placement,
    group: Processes,
) -> list[dict[str, Any]]:
    """A row of each arm, interleaved: unpruned, each keep ratio, and the unpruned model on one of the devices.

    A pass answers all requests. Where several processes work it begins for all at once, and takes as long as the last
    of them; while the one device works, the others wait.

    Args:
        model: where the placement has it; eval mode, unhooked.
        alone: all of it on the main process's device; None elsewhere, and where it does not fit.
        pruners: by keep ratio.
        batches: LongTensors [batch, tokens], all requests.
        settings: new tokens, repeats and warm-up are used.
        placement: of `model`.
        group: its processes.
    """
    watch, new_tokens = Stopwatch(group.device), settings.serving.new_tokens
    own = placement.share(batches, group.rank)
    arm = functools.partial(_arm, group=group, new_tokens=new_tokens, watch=watch)
    passes = {("unpruned", 1.0): arm(model, contextlib.nullcontext, own)}
    for ratio, pruner in pruners.items():
        passes["sdtp", ratio] = arm(model, functools.partial(pruner, model), own)
    if placement.kind != "one" and group.from_main(alone is not None):
        passes["one-device", 1.0] = arm(alone or model, contextlib.nullcontext, batches if group.main else [])
    named = {f"{method} {ratio}": run for (method, ratio), run in passes.items()}
    samples = interleave(named, settings.benchmark.repeats, settings.benchmark.warmup, progress=group.main)
    tokens, batch = batches[0].shape[1], batches[0].shape[0]
    about = {"batch": batch, "requests": sum(len(one) for one in batches)}
    return [
        {**times(method, tokens, samples[f"{method} {ratio}"]), "keep_ratio": ratio, **about}
        for method, ratio in passes
    ]


def _arm(
    model: PreTrainedModel,
    context: Context,
    batches: Sequence[torch.Tensor],
    *,
    group: Processes,
    new_tokens: int,
    watch: Stopwatch,
) -> Callable[[], Timing]:
    def run() -> Timing:
        group.largest(0.0)  # all begin when the last is ready
        with context():
            timing = answer(model, batches, new_tokens, watch)
        return Timing(group.largest(timing.prefill_s), group.largest(timing.end_to_end_s), new_tokens)

    return run
