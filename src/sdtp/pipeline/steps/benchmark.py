"""Times prefill and decode, unpruned against pruned at one keep ratio, and measures memory."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.evaluation import latency
from sdtp.evaluation.stats import paired_ratios, quartiles
from sdtp.pipeline.benchmark_text import benchmark_prompt
from sdtp.pipeline.config import BenchmarkSettings, Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import sha256_file
from sdtp.pipeline.limits import check_benchmark
from sdtp.pipeline.models import load_model, read_manifest
from sdtp.pipeline.pruners import read_pruner_at
from sdtp.pipeline.step import step
from sdtp.pipeline.timings import measured_on, peaks, times, write_timings
from sdtp.pruning import flops
from sdtp.pruning.pruner import TokenPruner


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp benchmark", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning and benchmark settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--text", required=True, type=Path, metavar="JSON", help="the benchmark's text")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="measurements to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("benchmark", args, outputs=[args.output], wildcards={"keep_ratio": args.keep_ratio}, times=True) as log:
        check_benchmark(settings.benchmark, read_manifest(args.model)["context_length"])
        log.dataset("benchmark", args.text, sha256_file(args.text))
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        pruner = read_pruner_at(args.pruner, settings.pruning, model.config.num_hidden_layers, args.keep_ratio)
        prompts = [benchmark_prompt(args.text, length) for length in settings.benchmark.prompt_tokens]
        rows: list[dict[str, Any]] = []
        for prompt_ids in tqdm(prompts, desc="benchmarking", unit="length"):
            unpruned, pruned = measure(model, pruner, prompt_ids, settings.benchmark)
            rows += [unpruned, pruned]
            length = len(prompt_ids)
            rate = latency.prefill_tokens_per_second
            log.metrics(
                {
                    f"prefill_speedup/{length}": paired_ratios(unpruned["prefill_s"], pruned["prefill_s"])[1],
                    f"prompt_tokens_per_second/{length}": rate(1, length, quartiles(pruned["prefill_s"])[1]),
                    f"unpruned_prompt_tokens_per_second/{length}": rate(1, length, quartiles(unpruned["prefill_s"])[1]),
                }
            )
        result = {
            "keep_ratio": args.keep_ratio,
            **measured_on(model, settings.model),
            "warmup": settings.benchmark.warmup,
            "rows": rows,
        }
        write_timings(args.output, result)
        log.artifact(args.output)


def measure(
    model: PreTrainedModel, pruner: TokenPruner, prompt_ids: Sequence[int], settings: BenchmarkSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The unpruned and the pruned row of one prompt length; lists hold one number a round, in the order they ran.

    Rounds that measure memory come after those that measure time: see `peaks`. They decode as the timed ones do, since
    after a short prompt decoding may hold more than prefill.
    """
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    length, schedule = len(prompt_ids), pruner.schedule
    watch = latency.Stopwatch(prompt.device)
    passes = {
        **latency.arms(model, pruner, prompt, settings.new_tokens, watch),
        "scoring": latency.scoring_arm(model, pruner, length, watch),
    }
    samples = latency.interleave(passes, settings.repeats, settings.warmup)
    held = peaks(model, {arm: passes[arm] for arm in ("unpruned", "sdtp")})
    unpruned = {
        **times("unpruned", length, samples["unpruned"]),
        **held["unpruned"],
        "kept_tokens": length,
        "prefill_flop": flops.prefill(model.config, length),
    }
    pruned = {
        **times("sdtp", length, samples["sdtp"]),
        **held["sdtp"],
        "ideal_s": [timing.prefill_s for timing in samples["ideal"].warm],
        "scoring_s": [timing.prefill_s for timing in samples["scoring"].warm],
        "kept_tokens": schedule.surviving(length)[-1],
        "prefill_flop": flops.prefill(model.config, length, schedule, pruner.scorer),
        "scoring_flop": flops.scoring(length, schedule, pruner.scorer),
    }
    return unpruned, pruned
