"""Computes one shard of the saliency of the training and held-out examples on the frozen model."""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.chunks import Chunks, chunked
from sdtp.pipeline.config import SaliencySettings, Settings
from sdtp.pipeline.data_folder import TRAINING, load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import digest
from sdtp.pipeline.libraries import LIBRARIES
from sdtp.pipeline.models import load_model
from sdtp.pipeline.schedules import stage_layers
from sdtp.pipeline.shards import metadata, write_shard
from sdtp.pipeline.step import step
from sdtp.training.batching import MOST_PADDING, demanding_first, length_batches
from sdtp.training.response import pads_exactly
from sdtp.training.saliency import NotFiniteError, Reduction, Target, batch_saliency

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp saliency", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning and saliency settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--shard", required=True, type=int, metavar="I", help="number of this shard, from 0")
    parser.add_argument(
        "--shards", required=True, type=int, metavar="K", help="shards in all, of about as many tokens each"
    )
    parser.add_argument("--checkpoints", required=True, type=Path, metavar="DIR", help="where a killed run resumes")
    parser.add_argument("--code", required=True, metavar="HASH", help="of the code; no other code's run is resumed")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    if not 0 <= args.shard < args.shards:
        raise UserError(f"--shard is {args.shard}: a number from 0 to {args.shards - 1} is accepted")
    settings = Settings.from_json(args.settings)
    with step("saliency", args, outputs=[args.output], wildcards={"shard": args.shard}) as log:
        for split in TRAINING:
            log.dataset(split, args.data / split, split_hash(args.data, split))
        examples, prompt_tokens, response_tokens = _examples(args.data, args.shard, args.shards)
        # The last response token predicts nothing and is not run.
        lengths = [prompt + response - 1 for prompt, response in zip(prompt_tokens, response_tokens, strict=True)]

        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        # One set of labels serves every ratio.
        layers = stage_layers(settings.pruning, model.config.num_hidden_layers)
        description = metadata(args.model, args.data, layers, settings.saliency.reduction, settings.saliency.target)
        most_padding = MOST_PADDING if pads_exactly(model) else 0.0
        batches = length_batches(lengths, settings.saliency.batch_tokens, most_padding)
        batches = demanding_first(batches, lengths, response_tokens)
        planned = list(chunked(batches))
        names = list(examples["id"])
        # Batches do, in a label's last bits. What is recomputed does not: who runs out of memory goes on recomputing.
        decides = {
            "labels": description,
            "shard": [args.shard, args.shards],
            "batches": batches,
            "dtype": str(model.dtype),
            "attention": settings.model.attention,
            "code": args.code,
            "libraries": LIBRARIES,
        }
        chunks = Chunks(
            args.checkpoints,
            digest(decides),
            [{names[i]: (len(layers), prompt_tokens[i]) for batch in chunk for i in batch} for chunk in planned],
        )
        taken = [i for number in chunks.whole for batch in planned[number] for i in batch]
        if taken:
            logger.info("%d of %d examples are taken from chunks of an interrupted run", len(taken), len(lengths))
        # In tokens: the longest examples come first, and would make the time that is left look longer than it is.
        with tqdm(
            total=sum(lengths),
            initial=sum(lengths[i] for i in taken),
            desc=f"saliency, shard {args.shard}",
            unit="token",
            unit_scale=True,
        ) as progress:
            done = len(taken)
            for number, chunk in enumerate(planned):
                if number in chunks.whole:
                    continue
                labels: dict[str, torch.Tensor] = {}
                for batch in chunk:
                    labels |= batch_labels(model, examples, batch, layers, settings.saliency)
                    done += len(batch)
                    progress.set_postfix_str(f"{done}/{len(lengths)} examples", refresh=False)
                    progress.update(sum(lengths[i] for i in batch))
                chunks.add(number, labels)
        write_shard(args.output, chunks.labels(), description, args.shard, args.shards)
        log.metric("examples", len(lengths))
        log.metric("examples_resumed", len(taken))
        log.metric("tokens", sum(prompt_tokens))
        padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
        log.metric("padding_fraction", 1 - sum(lengths) / padded if padded else 0.0)
    # The step's metrics are on disk: nothing would be computed again.
    chunks.clear()


def _examples(data: Path, shard: int, shards: int) -> tuple[Dataset, list[int], list[int]]:
    """One shard of the examples of all splits, columns id, prompt_ids and response_ids; read when asked for.

    Returns:
        The examples in the order of their files, and prompt and response tokens of each.

    Raises:
        UserError: an id comes twice, or an example has no prompt or no response.
    """
    splits = [load_split(data, split).select_columns(["id", "prompt_ids", "response_ids"]) for split in TRAINING]
    every = concatenate_datasets(splits)
    name, count = max(Counter(every["id"]).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise UserError(f"{data}: {count} examples have the id {name!r}, so that their labels could not be told apart")
    prompts, responses = _token_counts(every, "prompt_ids"), _token_counts(every, "response_ids")
    for key, counts in (("prompt_ids", prompts), ("response_ids", responses)):
        if 0 in counts:
            empty = every[counts.index(0)]["id"]
            raise UserError(f"example {empty!r}: {key} is empty, at least one token is needed")
    rows = share([prompt + response for prompt, response in zip(prompts, responses, strict=True)], shard, shards)
    return every.select(rows), [prompts[row] for row in rows], [responses[row] for row in rows]


def _token_counts(examples: Dataset, column: str) -> list[int]:
    """Tokens of each example, read off Arrow's offsets: no shard decodes the tokens of the others."""
    tables = examples.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return [count for table in tables for chunk in table[column].chunks for count in chunk.value_lengths().to_pylist()]


def share(lengths: Sequence[int], shard: int, shards: int) -> list[int]:
    """Rows of one shard, ascending: in order of length every `shards`-th row.

    Whatever the order in the files (the tasks take turns there), the tokens of two shards differ by the longest row's
    at most, and their longest rows, which decide memory, are about as long.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    return sorted(longest_first[shard::shards])


def batch_labels(
    model: PreTrainedModel,
    examples: Dataset,
    batch: Sequence[int],
    layers: Sequence[int],
    settings: SaliencySettings,
) -> dict[str, torch.Tensor]:
    """Saliency of a batch of examples, on the CPU, by id.

    Raises:
        UserError: it is not finite, naming example and stage; or no memory is left on the device, naming what needs
            less.
        RuntimeError: what else went wrong, naming the examples.
    """
    rows = [examples[i] for i in batch]
    responses = [len(row["response_ids"]) for row in rows]
    try:
        found = batch_saliency(
            model,
            [torch.tensor(row["prompt_ids"]) for row in rows],
            [torch.tensor(row["response_ids"]) for row in rows],
            layers,
            # `batch_saliency` itself refuses other words.
            cast(Reduction, settings.reduction),
            cast(Target, settings.target),
            settings.gradient_checkpointing,
        )
    except NotFiniteError as error:
        weights = f"if it stays so, the weights of {model.name_or_path} are not finite themselves"
        raise UserError(f"example {rows[error.row]['id']!r}: {error}; {weights}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"no memory was left on {model.device} for the forward and backward pass of {len(rows)} examples, "
            f"{rows[0]['id']!r} the first, of up to {max(len(row['prompt_ids']) for row in rows)} prompt and "
            f"{max(responses)} response tokens: saliency.gradient_checkpointing: true takes a fraction of what the "
            f"layers keep; where that is set, or most of it are the logits of {sum(responses)} response tokens, a "
            "smaller saliency.batch_tokens; for one example alone a smaller data.max_tokens"
        ) from error
    except RuntimeError as error:
        raise RuntimeError(f"examples {', '.join(repr(row['id']) for row in rows)}: {error}") from error
    return {row["id"]: label.cpu() for row, label in zip(rows, found, strict=True)}
