"""Stores the unpruned model's last hidden states on the test examples, for agreement with it."""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.agreement import check_finite
from sdtp.evaluation.head import Head, response_states
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.models import load_model
from sdtp.pipeline.reference import write_reference
from sdtp.pipeline.step import step
from sdtp.training.batching import length_batches


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp reference", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model and batch size")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which test is used")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="states by example, as safetensors")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    with step("reference", args, outputs=[args.output]) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        examples = load_split(args.data, "test").to_list()
        log.dataset("test", args.data / "test", split_hash(args.data, "test"))
        states = reference(model, examples, settings.evaluation.batch_tokens)
        write_reference(args.output, states, examples, args.model)
        log.metrics({"examples": len(states), "positions": sum(len(own) for own in states.values())})


def reference(model: PreTrainedModel, examples: list[dict[str, Any]], batch_tokens: int) -> dict[str, torch.Tensor]:
    """The states that enter the head to predict the response's tokens, by example id: [response, hidden], on the CPU.

    Args:
        model: eval mode, unhooked.
        examples: rows of the test split.
        batch_tokens: most prompt tokens of a batch; a longer prompt runs alone.

    Raises:
        UserError: the model's head alone does not give the logits that the whole model gives, or some are not finite.
    """
    head, checked = Head(model), False
    found: dict[str, torch.Tensor] = {}
    with tqdm(total=len(examples), desc="unpruned", unit="example") as progress:
        for batch in length_batches([len(example["prompt_ids"]) for example in examples], batch_tokens, most_padding=0):
            prompts, responses = ([examples[index][name] for index in batch] for name in ("prompt_ids", "response_ids"))
            for index, (states, logits) in zip(batch, response_states(model, prompts, responses), strict=True):
                largest = float(logits.float().abs().max())
                check_finite(f"the unpruned model on example {examples[index]['id']!r}", {"largest logit": largest})
                if not checked:
                    checked = True
                    try:
                        head.check(states, logits)
                    except TypeError as error:
                        raise UserError(f"{error}, and no agreement with the unpruned model can be measured") from error
                found[examples[index]["id"]] = states.cpu().contiguous()
            progress.update(len(batch))
    return found
