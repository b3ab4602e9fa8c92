"""Refuses settings that the model or the benchmark's text has no room for, before a long step finds that out."""

import argparse
import json
from pathlib import Path
from typing import Any

from sdtp.pipeline.benchmark_text import check_benchmark_text
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.limits import check_benchmark, check_context
from sdtp.pipeline.models import load_tokenizer, read_manifest
from sdtp.pipeline.schedules import stage_layers
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp check", description=__doc__)
    parser.add_argument(
        "--settings", required=True, metavar="JSON", help="data, pruning, generation, benchmark settings"
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder: manifest and tokenizer")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="what was checked, to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("check", args, outputs=[args.output]) as log:
        manifest = read_manifest(args.model)
        checked = check_settings(settings, manifest["num_layers"], manifest["context_length"])
        lengths = settings.benchmark.prompt_tokens
        checked["benchmark_tokens"] = check_benchmark_text(load_tokenizer(args.model), settings.data, lengths)
        with write_atomically(args.output) as temporary:
            temporary.write_text(json.dumps(checked, indent=2) + "\n", "utf-8")
        log.metric("stages", len(checked["layers"]))


def check_settings(settings: Settings, num_layers: int, context: int | None) -> dict[str, Any]:
    """Checks the settings against a model of `num_layers` layers and `context` tokens, None where it states no limit.

    Returns:
        The model's numbers, and the layers before which tokens are removed.

    Raises:
        UserError: naming the config key, its value and what the model has.
    """
    layers = stage_layers(settings.pruning, num_layers)
    new_tokens = settings.generation.max_new_tokens
    check_context({"data.max_tokens": settings.data.max_tokens, "generation.max_new_tokens": new_tokens}, context)
    check_benchmark(settings.benchmark, context)
    return {"num_layers": num_layers, "context_length": context, "layers": list(layers)}
