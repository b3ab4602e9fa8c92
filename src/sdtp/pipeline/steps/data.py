"""Makes the tokenised splits: training, held-out and test examples, and the benchmark's text."""

import argparse
from pathlib import Path

from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import SPLITS, build_dataset, longest_response
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import load_tokenizer, read_manifest
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
        # Saliency and training run over prompt and response together.
        tokens = {"data.max_tokens": settings.data.max_tokens, "longest response": longest_response(settings.data)}
        check_context(tokens, read_manifest(args.model)["context_length"])
        manifest = build_dataset(load_tokenizer(args.model), settings.data, settings.seed, args.output)
        for split in SPLITS:
            described = manifest["splits"][split]
            log.metric(f"{split}/examples", described["examples"])
            log.metric(f"{split}/prompt_tokens_cut", described.get("prompt_tokens_cut", 0))
            log.metric(f"{split}/records_in_training", described.get("in_training", 0))
            log.metric(f"{split}/records_skipped", sum(described.get("records", {}).get("skipped", {}).values()))
            revision = described["source"].get("revision") or described["source"].get("version")
            log.dataset(split, args.output / split, described["content_sha256"], revision)
        log.artifact(args.output / "manifest.json")
