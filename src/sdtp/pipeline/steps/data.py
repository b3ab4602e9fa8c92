"""Makes the tokenised examples that a pruner learns from, training and held-out."""

import argparse
from pathlib import Path

from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import build_training_data
from sdtp.pipeline.data_steps import checked_tokenizer, log_data
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp data", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="seed and data settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, for its tokenizer")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="data folder to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("data", args, outputs=[args.output]) as log:
        tokenizer = checked_tokenizer(args.model, settings.data.max_tokens, settings.data.train.source)
        manifest = build_training_data(tokenizer, settings.data, settings.seed, args.output)
        log_data(log, args.output, manifest)
