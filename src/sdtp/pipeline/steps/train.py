"""Fits the token scorers on the frozen model and saves the pruner."""

import argparse
import contextlib
import csv
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import TRAINING, load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import atomic_folder, canonical_json, sha256_file, write_atomically
from sdtp.pipeline.launch import check_launcher, end_with_launcher, launch, launched, slurm_tasks
from sdtp.pipeline.learned import build_scorer
from sdtp.pipeline.models import choose_dtype, load_model
from sdtp.pipeline.schedules import build_schedule
from sdtp.pipeline.shards import Labels, metadata
from sdtp.pipeline.step import StepLog, step
from sdtp.pipeline.tracking import TrackedRun
from sdtp.pruning import store
from sdtp.pruning.fingerprint import fingerprint
from sdtp.training.backbone import shard
from sdtp.training.examples import Example
from sdtp.training.heldout import best_evaluation
from sdtp.training.objective import Weights
from sdtp.training.options import Options
from sdtp.training.processes import FailedElsewhereError, Processes
from sdtp.training.trainer import fit

logger = logging.getLogger(__name__)

# Where the tracker has the pruners of the last few checkpoints, each a folder that TokenPruner.from_pretrained takes.
_TRACKED, _TRACKED_COUNT = "checkpoints", 3


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
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="most processes to train as, one a GPU that can be seen"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="pruner folder to write")
    parser.add_argument("--history", required=True, type=Path, metavar="CSV", help="learning curves to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    processes = max(1, min(args.processes, torch.cuda.device_count()))
    if processes * slurm_tasks(os.environ) > 1 and not launched():
        launch(processes, sys.argv[1:])
        return
    if launched():
        end_with_launcher()
    # Before anything is put on a GPU: it makes this process's the current one.
    group = Processes(cpu=choose_device().type == "cpu")
    with contextlib.suppress(FailedElsewhereError):  # the main process says what failed, and fails
        if group.main:
            outputs = [args.output, args.history]
            wildcards = {"keep_ratio": Settings.from_json(args.settings).training.keep_ratio}
            with step("train", args, outputs=outputs, wildcards=wildcards) as log:
                _train(args, group, log)
        else:
            _train(args, group, StepLog(TrackedRun(None, "")))


def _train(args: argparse.Namespace, group: Processes, log: StepLog) -> None:
    """What every process does; the main one alone writes."""
    settings = Settings.from_json(args.settings)
    training = settings.training
    with group.together():
        check_launcher(os.environ)
        weights = Weights(
            ce=training.weights.ce, mse=training.weights.mse, rank=training.weights.rank, kl=training.weights.kl
        )
        dtype = str(choose_dtype(settings.model.dtype, group.device)).removeprefix("torch.")
        sharded = training.shard_model and group.count > 1
        if training.shard_model and not sharded and group.main:
            logger.warning("training.shard_model has nothing to spread over: one process trains (training.gpus)")
        model = load_for(group, args.model, dtype, settings.model.attention, sharded)
        schedule = build_schedule(settings.pruning, model.config.num_hidden_layers, training.keep_ratio)
        labels = Labels(args.saliency)
        made_of = labels.description
        expected = metadata(args.model, args.data, schedule.layers, made_of["reduction"], made_of["target"])
        for key, value in expected.items():
            if made_of[key] != value:
                raise UserError(f"{args.saliency}: {key} is {made_of[key]}, but {value} is needed here")
        for split in TRAINING:
            log.dataset(split, args.data / split, split_hash(args.data, split))
        examples = {split: Examples(load_split(args.data, split), labels) for split in TRAINING}
        trained_for = fingerprint(model)  # the main process's is the one that is written: it has seen the weights
    if sharded:
        shard(model, group)
    scorer = build_scorer(training, model, schedule, settings.seed).to(group.device)
    reported: list[tuple[dict[str, float], int, str]] = []

    def record(metrics: dict[str, float], at: int, split: str) -> None:
        reported.append((metrics, at, split))
        log.metrics({f"{split}/{name}": value for name, value in metrics.items()}, step=at)

    def keep(at: int) -> None:
        try:
            with TemporaryDirectory() as folder:
                pruner = Path(folder, f"step-{at:08d}")
                store.save(pruner, schedule, scorer, trained_for)
                log.artifact(pruner, _TRACKED)
        except OSError as error:  # a full disk for temporary files: tracking is not what a training should end of
            logger.warning("the scorers of step %d are not tracked: %s", at, error)
        log.latest_artifacts(_TRACKED, _TRACKED_COUNT)

    final = fit(
        model,
        scorer,
        schedule,
        examples["train"],
        examples["heldout"],
        Options(
            label_epochs=training.label_epochs,
            label_examples=training.label_examples,
            steps=training.steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            temperature=training.temperature,
            sampler=training.sampler,
            weights=weights,
            evaluate_every=training.evaluate_every,
            checkpoint_every=training.checkpoint_every,
            patience=training.patience,
            autocast=training.autocast,
            gradient_checkpointing=training.gradient_checkpointing,
            seed=settings.seed,
        ),
        record,
        checkpoints=args.checkpoints,
        # The index holds the hashes of the labels, and of the model and data they were made from.
        inputs=canonical_json([args.code, sha256_file(args.saliency), str(model.dtype), settings.model.attention]),
        on_checkpoint=keep,
        tracking_run=log.run_id,
    )
    if not group.main:
        return
    with atomic_folder(args.output) as temporary:
        store.save(temporary, schedule, scorer.cpu(), trained_for)
    with write_atomically(args.history) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "split", "metric", "value"))
        writer.writerows(
            (at, split, name, value)
            for metrics, at, split in reported
            if split != "labels"  # whose steps are epochs: another axis
            for name, value in metrics.items()
        )
    log.metrics({f"heldout_{name}": value for name, value in final.items()})
    log.metrics(updates(reported, min(len(examples["train"]), training.label_examples), training.patience))
    log.artifact(args.output)
    log.artifact(args.history)


def load_for(group: Processes, folder: Path, dtype: str, attention: str, sharded: bool) -> PreTrainedModel:
    """The frozen model as this process needs it.

    Args:
        group: the processes that train.
        folder, dtype, attention: see `load_model`.
        sharded: whether `shard` gets the model, which spreads it from the main process. Then that one alone reads it,
            since the host need not hold it more than once, and to the CPU, since it need not fit on a GPU; on the
            others it is on the meta device. Otherwise each process reads a copy to its own device.
    """
    if not sharded:
        return load_model(folder, dtype, attention, group.device)
    return load_model(folder, dtype, attention, torch.device("cpu"), None if group.main else {"device_map": "meta"})


def updates(
    reported: Sequence[tuple[dict[str, float], int, str]], label_examples: int, patience: int
) -> dict[str, int]:
    """What made the scorer: its `label_updates`, `optimizer_steps`, and the one of these it was kept from, `kept_step`.

    Args:
        reported: (metrics, step, split) of all that `fit` reported; an update on labels is of one example, and their
            steps are epochs.
        label_examples: in a label epoch.
        patience: as `fit` had it; without any the last step is kept.
    """
    last = {split: max((at for _, at, own in reported if own == split), default=0) for split in ("labels", "train")}
    kept = best_evaluation(reported)[0] if patience else None
    return {
        "label_updates": last["labels"] * label_examples,
        "optimizer_steps": last["train"],
        "kept_step": last["train"] if kept is None else kept,
    }
