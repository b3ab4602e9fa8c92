"""Times methods at one keep ratio against the unpruned model, all interleaved in one process, and measures memory."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import latency, names
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.stats import paired_ratios
from sdtp.pipeline.benchmark_text import benchmark_prompt
from sdtp.pipeline.chosen import check_method, chosen_method
from sdtp.pipeline.config import BenchmarkSettings, Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import sha256_file
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import load_model, read_manifest
from sdtp.pipeline.schedules import stage_layers
from sdtp.pipeline.step import step
from sdtp.pipeline.timings import measured_on, peaks, times, write_timings
from sdtp.pruning import flops
from sdtp.pruning.pruner import TokenPruner

# What is timed: no examples, whose saliency the oracle looks up, and nothing that is the unpruned model itself.
TIMED = [method for method in names.METHODS if method not in ("unpruned", "oracle")]


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp time-methods", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, benchmark and the methods' settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--text", required=True, type=Path, metavar="JSON", help="the benchmark's text")
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="trained pruner, for what uses it")
    parser.add_argument("--tuned", type=Path, metavar="DIR", help="pruner tuned for the keep ratio, for sdtp-tuned")
    parser.add_argument("--methods", required=True, nargs="+", choices=TIMED, help="what is timed")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for METHOD-RATIO.json of each"
    )
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    pruners = {method: args.tuned if method == names.TUNED else args.pruner for method in args.methods}
    if names.TUNED in args.methods and args.tuned is None:
        raise UserError(f"--tuned is missing: method {names.TUNED} needs the folder of a tuned pruner")
    for method in args.methods:
        check_method(method, args.keep_ratio, pruners[method])
    settings = Settings.from_json(args.settings)
    outputs = {method: args.output / f"{method}-{args.keep_ratio}.json" for method in args.methods}
    wildcards = {"keep_ratio": args.keep_ratio}
    with step("time-methods", args, list(outputs.values()), wildcards, times=True) as log:
        for length in settings.peers.prompt_tokens:
            tokens = {"peers.prompt_tokens": length, "benchmark.new_tokens": settings.benchmark.new_tokens}
            check_context(tokens, read_manifest(args.model)["context_length"])
        log.dataset("benchmark", args.text, sha256_file(args.text))
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        prompts = [benchmark_prompt(args.text, length) for length in settings.peers.prompt_tokens]
        attached = {
            method: _attached(chosen_method(method, settings, model, args.keep_ratio, pruners[method])(prompts[0], []))
            for method in args.methods
        }
        rows = [
            measure(model, attached, prompt, settings.benchmark)
            for prompt in tqdm(prompts, desc="timing methods", unit="length")
        ]
        for method, path in outputs.items():
            own = [row for by_method in rows for row in (by_method["unpruned"], by_method[method])]
            result = {
                "method": method,
                "keep_ratio": args.keep_ratio,
                **measured_on(model, settings.model),
                "stages": stages(method, settings, model.config.num_hidden_layers, attached[method]),
                "warmup": settings.benchmark.warmup,
                "rows": own,
            }
            write_timings(path, result)
            log.artifact(path)
            for unpruned, timed in zip(own[::2], own[1::2], strict=True):
                speedup = paired_ratios(unpruned["prefill_s"], timed["prefill_s"])[1]
                log.metric(f"prefill_speedup/{method}/{timed['prompt_tokens']}", speedup)


def stages(method: str, settings: Settings, num_layers: int, attached: TokenPruner | Peer) -> list[int]:
    """The 0-based layers of the stages that a method prunes at, or whose survivors it matches."""
    if "schedule" not in names.needs(method):
        return []
    if method == names.TUNED and isinstance(attached, TokenPruner):
        tuned = attached.schedule
        before = [1.0, *tuned.keep[:-1]]  # a stage that leaves what reaches it is none
        return [layer for layer, a, b in zip(tuned.layers, before, tuned.keep, strict=True) if b < a]
    layers = stage_layers(settings.pruning, num_layers)
    return [layers[stage] for stage in names.half(len(layers))] if method == "sdtp-half" else list(layers)


def _attached(pruner: TokenPruner | Peer | None) -> TokenPruner | Peer:
    if pruner is None:
        raise UserError(f"--methods: nothing to time; one of {', '.join(TIMED)} is accepted")
    return pruner


def measure(
    model: PreTrainedModel,
    methods: Mapping[str, TokenPruner | Peer],
    prompt_ids: Sequence[int],
    settings: BenchmarkSettings,
) -> dict[str, dict[str, Any]]:
    """A row of `unpruned` and of each method for one prompt; lists hold one number a round, in the order they ran.

    In every round each of them runs once, in turn, so that the numbers of one round were measured side by side. Rounds
    that measure memory come after those that measure time.
    """
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    watch = latency.Stopwatch(prompt.device)
    arms = latency.methods_arms(model, methods, prompt, settings.new_tokens, watch)
    samples = latency.interleave(arms, settings.repeats, settings.warmup)
    held = peaks(model, latency.methods_arms(model, methods, prompt, 1, watch))
    return {
        name: {
            **times(name, len(prompt_ids), samples[name]),
            **held[name],
            "prefill_flop": prefill_flops(model.config, methods.get(name), len(prompt_ids)),
        }
        for name in arms
    }


def prefill_flops(config: Any, method: TokenPruner | Peer | None, prompt_tokens: int) -> float:
    """Operations of the prefill of a prompt under a method, None being the unpruned model; see `sdtp.pruning.flops`."""
    if isinstance(method, Peer):
        return method.prefill_flops(config, prompt_tokens)
    if method is None:
        return flops.prefill(config, prompt_tokens)
    return flops.prefill(config, prompt_tokens, method.schedule, method.scorer)
