"""Fits scorers at every layer that the sweeps prune at, to saliency alone, and saves them as one pruner."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import atomic_folder
from sdtp.pipeline.learned import build_scorer
from sdtp.pipeline.models import load_model
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.saliency import batch_labels
from sdtp.pipeline.sweep_cells import swept_layers
from sdtp.pruning import store
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.schedule import PruningSchedule
from sdtp.training.batching import MOST_PADDING, demanding_first, length_batches
from sdtp.training.examples import Example, check_examples
from sdtp.training.label_fit import check_states_fit, fit_labels, stored_states
from sdtp.training.optimizer import adamw
from sdtp.training.processes import Processes
from sdtp.training.response import pads_exactly


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp sweep-train", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning, saliency, training, sweep")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which train is used")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="pruner folder to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    training = settings.training
    if not training.label_epochs or not (training.weights.mse or training.weights.rank):
        raise UserError(
            f"training.label_epochs is {training.label_epochs}, training.weights.mse {training.weights.mse:g} and rank "
            f"{training.weights.rank:g}: the sweep's scorers learn from saliency alone, which needs an epoch at least "
            "and one of the two weights above 0"
        )
    with step("sweep-train", args, outputs=[args.output]) as log:
        log.dataset("train", args.data / "train", split_hash(args.data, "train"))
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        layers = swept_layers(settings.sweep, settings.pruning, model.config.num_hidden_layers)
        # It keeps everything until it is given some of its stages and a ratio.
        schedule = PruningSchedule(
            layers,
            (1.0,) * len(layers),
            sinks=settings.pruning.sinks,
            local=settings.pruning.local,
            min_local=settings.pruning.min_local,
        )
        split = load_split(args.data, "train")
        split = split.select(range(min(len(split), training.label_examples)))
        processes = Processes(cpu=model.device.type == "cpu")
        hidden_size = model.config.get_text_config().hidden_size
        check_states_fit([len(ids) for ids in split["prompt_ids"]], len(layers), hidden_size, processes)
        examples = _labelled(model, split, layers, settings)
        check_examples(examples, layers, model.config.get_text_config().vocab_size)
        states = stored_states(model, examples, layers, processes, lockstep=False)
        scorer = build_scorer(training, model, schedule, settings.seed).to(model.device)
        optimizer, rates = adamw(scorer, training.learning_rate, training.label_epochs * len(examples))
        losses = []

        def record(loss: float, epoch: int) -> None:
            losses.append(loss)
            log.metric("label_loss", loss, step=epoch)

        fit_labels(
            scorer,
            optimizer,
            rates,
            states,
            examples,
            epochs=range(1, training.label_epochs + 1),
            mse=training.weights.mse,
            rank=training.weights.rank,
            seed=settings.seed,
            log=record,
            processes=processes,
        )
        with atomic_folder(args.output) as temporary:
            store.save(temporary, schedule, scorer.cpu(), fingerprint(model))
        log.metrics({"examples": len(examples), "stages": len(layers), "label_loss_at_end": losses[-1]})
        log.artifact(args.output)


def _labelled(model: PreTrainedModel, split: Dataset, layers: Sequence[int], settings: Settings) -> Sequence[Example]:
    """The examples with their saliency at all layers, of one backward each.

    Raises:
        UserError: what `batch_labels` refuses.
    """
    rows = split.to_list()
    # The last response token predicts nothing and is not run.
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) - 1 for row in rows]
    labels: dict[str, torch.Tensor] = {}
    with tqdm(total=len(rows), desc="saliency", unit="example") as progress:
        most_padding = MOST_PADDING if pads_exactly(model) else 0.0
        batches = length_batches(lengths, settings.saliency.batch_tokens, most_padding)
        for batch in demanding_first(batches, lengths, [len(row["response_ids"]) for row in rows]):
            labels |= batch_labels(model, split, batch, layers, settings.saliency)
            progress.update(len(batch))
    return [
        Example(row["id"], torch.tensor(row["prompt_ids"]), torch.tensor(row["response_ids"]), labels[row["id"]])
        for row in rows
    ]
