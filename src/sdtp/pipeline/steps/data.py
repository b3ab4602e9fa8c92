"""Makes the tokenised splits: training, held-out and test examples, and the benchmark's text."""

import argparse
from pathlib import Path

from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import SPLITS, build_dataset, longest_response
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import check_template, load_tokenizer, read_manifest
from sdtp.pipeline.records import REPAIRED, SKIPPED
from sdtp.pipeline.step import step

# Of a split made of records, what its manifest counts beside rows.
RECORD_COUNTS = ("in_training", "prompts_cut", "prompt_tokens_cut", "responses_cut", "response_tokens_cut")


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
        tokenizer = load_tokenizer(args.model)
        check_template(tokenizer, args.model)
        manifest = build_dataset(tokenizer, settings.data, settings.seed, args.output)
        for split in SPLITS:
            described = manifest["splits"][split]
            log.metric(f"{split}/examples", described["examples"])
            log.metrics({f"{split}/{count}": number for count, number in described["rows"].items()})
            if "skipped" in described:  # made of records
                log.metrics({f"{split}/skipped_{reason}": described["skipped"].get(reason, 0) for reason in SKIPPED})
                log.metrics({f"{split}/repaired_{what}": described["repaired"].get(what, 0) for what in REPAIRED})
                log.metrics({f"{split}/{count}": described[count] for count in RECORD_COUNTS})
            revision = described["source"].get("revision") or described["source"].get("version")
            log.dataset(split, args.output / split, described["content_sha256"], revision)
        log.artifact(args.output / "manifest.json")
