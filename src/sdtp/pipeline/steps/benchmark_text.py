"""Tokenises the text that benchmarks cut their prompts from: documents of the test data, one after the other."""

import argparse
from pathlib import Path

from sdtp.pipeline.benchmark_text import write_benchmark_text
from sdtp.pipeline.config import Settings
from sdtp.pipeline.models import load_tokenizer
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp benchmark-text", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="data settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, for its tokenizer")
    parser.add_argument("--output", required=True, type=Path, metavar="JSON", help="text to write, as ids")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("benchmark-text", args, outputs=[args.output]) as log:
        log.metric("tokens", write_benchmark_text(load_tokenizer(args.model), settings.data, args.output))
