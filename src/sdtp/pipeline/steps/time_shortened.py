"""Times the model on prompts that LLMLingua-2 shortened against the whole ones, interleaved in one process."""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.evaluation import latency
from sdtp.pipeline.config import BenchmarkSettings, Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.models import load_model
from sdtp.pipeline.paper.shortened import LLMLINGUA, speed
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.step import step
from sdtp.pipeline.timings import measured_on, times, write_timings


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp time-shortened", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model and benchmark settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument(
        "--shortened", required=True, type=Path, metavar="JSON", help="prompts before and after, and what it took"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="timings to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    shortened = read_json(args.shortened)
    wildcards = {"keep_ratio": shortened["keep_ratio"]}
    with step("time-shortened", args, outputs=[args.output], wildcards=wildcards, times=True) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        rows = []
        for prompt in tqdm(shortened["rows"], desc="timing shortened prompts", unit="length"):
            unpruned, own = measure(model, prompt, settings.benchmark)
            rows += [unpruned, own]
            log.metric(f"prefill_speedup/{unpruned['prompt_tokens']}", speed(unpruned, own).prefill)
        result = {
            "method": LLMLINGUA,
            "keep_ratio": shortened["keep_ratio"],
            **measured_on(model, settings.model),
            # The other environment's, and its weights.
            "shortening": {name: shortened[name] for name in ("weights", "device", "versions", "warmup")},
            "warmup": settings.benchmark.warmup,
            "rows": rows,
        }
        write_timings(args.output, result)
        log.artifact(args.output)


def measure(
    model: PreTrainedModel, prompt: dict[str, Any], settings: BenchmarkSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of the whole prompt and that of the shortened one; lists hold one number a repeat.

    Args:
        model: eval mode, unhooked: it runs both.
        prompt: `prompt_ids`, `shortened_ids`, and `shortening_s`, which goes into the second row.
        settings: new tokens, rounds of warm-up and timed rounds.
    """
    watch = latency.Stopwatch(model.device)
    arms = {
        name: functools.partial(
            latency.timed_pass, model, torch.tensor([ids], device=model.device), settings.new_tokens, watch
        )
        for name, ids in (("unpruned", prompt["prompt_ids"]), (LLMLINGUA, prompt["shortened_ids"]))
    }
    samples = latency.interleave(arms, settings.repeats, settings.warmup)
    length = len(prompt["prompt_ids"])
    return times("unpruned", length, samples["unpruned"]), {
        **times(LLMLINGUA, length, samples[LLMLINGUA]),
        "kept_tokens": len(prompt["shortened_ids"]),
        "shortening_s": prompt["shortening_s"],
    }
