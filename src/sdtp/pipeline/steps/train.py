"""Fits the token scorers on the frozen model and saves the pruner."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import atomic_folder, canonical_json, sha256_file, write_atomically
from sdtp.pipeline.models import load_model
from sdtp.pipeline.schedules import build_schedule
from sdtp.pipeline.shards import SPLITS, Labels, metadata
from sdtp.pipeline.step import step
from sdtp.pruning import store
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.scorers import Learned
from sdtp.training.examples import Example
from sdtp.training.objective import Weights
from sdtp.training.trainer import Options, fit


class Examples(Sequence[Example]):
    """A split joined with its labels, an example read when it is asked for."""

    def __init__(self, split: Dataset, labels: Labels) -> None:
        self._split = split
        self._labels = labels

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices: nothing takes one
        row = self._split[index]
        prompt_ids, response_ids = torch.tensor(row["prompt_ids"]), torch.tensor(row["response_ids"])
        return Example(row["id"], prompt_ids, response_ids, self._labels[row["id"]])


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp train", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="seed, model, pruning, training settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--saliency", required=True, type=Path, metavar="FILE", help="index of the saliency shards")
    parser.add_argument("--checkpoints", required=True, type=Path, metavar="DIR", help="where a killed run resumes")
    parser.add_argument("--code", required=True, metavar="HASH", help="of the code; no other code's run is resumed")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="pruner folder to write")
    parser.add_argument("--history", required=True, type=Path, metavar="CSV", help="learning curves to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    training = settings.training
    weights = Weights(ce=training.weights.ce, mse=training.weights.mse, rank=training.weights.rank)
    with step("train", args, outputs=[args.output, args.history], wildcards={"keep_ratio": training.keep_ratio}) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        schedule = build_schedule(settings.pruning, model.config.num_hidden_layers, training.keep_ratio)
        labels = Labels(args.saliency)
        made_of = labels.description
        expected = metadata(args.model, args.data, schedule.layers, made_of["reduction"], made_of["target"])
        for key, value in expected.items():
            if made_of[key] != value:
                raise UserError(f"{args.saliency}: {key} is {made_of[key]}, but {value} is needed here")
        for split in SPLITS:
            log.dataset(split, args.data / split, split_hash(args.data, split))

        torch.manual_seed(settings.seed)
        scorer = Learned(model.config.hidden_size, schedule.stages, training.width).to(model.device)
        history: list[tuple[int, str, str, float]] = []

        def record(metrics: dict[str, float], at: int, split: str) -> None:
            if split != "labels":  # whose steps are epochs: another axis
                history.extend((at, split, name, value) for name, value in metrics.items())
            log.metrics({f"{split}/{name}": value for name, value in metrics.items()}, step=at)

        final = fit(
            model,
            scorer,
            schedule,
            Examples(load_split(args.data, "train"), labels),
            Examples(load_split(args.data, "heldout"), labels),
            Options(
                label_epochs=training.label_epochs,
                label_examples=training.label_examples,
                steps=training.steps,
                batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                temperature=training.temperature,
                weights=weights,
                evaluate_every=training.evaluate_every,
                checkpoint_every=training.checkpoint_every,
                seed=settings.seed,
            ),
            record,
            checkpoints=args.checkpoints,
            # The index holds the hashes of the labels, and of the model and data they were made from.
            inputs=canonical_json([args.code, sha256_file(args.saliency), str(model.dtype), settings.model.attention]),
            on_checkpoint=lambda folder: log.artifact(folder, "checkpoints"),
        )
        with atomic_folder(args.output) as temporary:
            store.save(temporary, schedule, scorer.cpu(), fingerprint(model))
        with write_atomically(args.history) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "split", "metric", "value"))
            writer.writerows(history)
        log.metrics({f"heldout_{name}": value for name, value in final.items()})
        log.artifact(args.output)
        log.artifact(args.history)
