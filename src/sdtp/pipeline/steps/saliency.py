"""Computes one shard of the saliency of the training and held-out examples on the frozen model."""

import argparse
import json
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.models import load_model
from sdtp.pipeline.schedules import stage_layers
from sdtp.pipeline.shards import SPLITS, metadata
from sdtp.pipeline.step import step
from sdtp.training.saliency import Reduction, Target, saliency


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp saliency", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning and saliency settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--shard", required=True, type=int, metavar="I", help="number of this shard, from 0")
    parser.add_argument("--shards", required=True, type=int, metavar="K", help="shards in all; this one has each K-th")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    if not 0 <= args.shard < args.shards:
        raise UserError(f"--shard is {args.shard}: a number from 0 to {args.shards - 1} is accepted")
    settings = Settings.from_json(args.settings)
    with step("saliency", args, outputs=[args.output], wildcards={"shard": args.shard}) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        # One set of labels serves every ratio.
        layers = stage_layers(settings.pruning, model.config.num_hidden_layers)
        for split in SPLITS:
            log.dataset(split, args.data / split, split_hash(args.data, split))
        examples = [example for split in SPLITS for example in load_split(args.data, split)][args.shard :: args.shards]
        labels = {}
        for example in tqdm(examples, desc=f"saliency, shard {args.shard}", unit="example"):
            try:
                labels[example["id"]] = saliency(
                    model,
                    torch.tensor(example["prompt_ids"]),
                    torch.tensor(example["response_ids"]),
                    layers,
                    # `saliency` itself refuses other words.
                    cast(Reduction, settings.saliency.reduction),
                    cast(Target, settings.saliency.target),
                    settings.saliency.gradient_checkpointing,
                ).cpu()
            except RuntimeError as error:
                raise RuntimeError(f"example {example['id']!r}: {error}") from error
        description = metadata(args.model, args.data, layers, settings.saliency.reduction, settings.saliency.target)
        with write_atomically(args.output) as temporary:
            save_file(labels, temporary, {**description, "layers": json.dumps(description["layers"])})
        log.metric("examples", len(labels))
        log.metric("tokens", sum(label.shape[1] for label in labels.values()))
