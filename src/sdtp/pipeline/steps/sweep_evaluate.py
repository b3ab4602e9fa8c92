"""Measures the quality of some of the sweep's stages at one keep ratio on the test examples, teacher-forced."""

import argparse
import functools
from pathlib import Path

from sdtp.errors import UserError
from sdtp.evaluation.methods import Fixed
from sdtp.pipeline.config import Settings
from sdtp.pipeline.data_folder import load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.models import load_model
from sdtp.pipeline.pruners import read_pruner
from sdtp.pipeline.reference import Reference
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.evaluate import evaluate
from sdtp.pipeline.sweeps import first_of_each_task
from sdtp.pruning import flops
from sdtp.pruning.pruner import TokenPruner


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp sweep-evaluate", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, batch size, number of examples")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which test is used")
    parser.add_argument("--reference", required=True, type=Path, metavar="FILE", help="made by `sdtp reference`")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="pruner with all stages")
    parser.add_argument("--layers", required=True, nargs="+", type=int, metavar="L", help="layers of the stages to use")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings = Settings.from_json(args.settings)
    wildcards = {"layers": "-".join(map(str, args.layers)), "keep_ratio": args.keep_ratio}
    with step("sweep-evaluate", args, outputs=[args.output], wildcards=wildcards) as log:
        pruner = part_of(read_pruner(args.pruner), args.layers, args.keep_ratio)
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        examples = first_of_each_task(load_split(args.data, "test").to_list(), settings.sweep.examples)
        log.dataset("test", args.data / "test", split_hash(args.data, "test"))

        @functools.cache  # counting builds the model without storage
        def operations(prompt_tokens: int) -> dict[str, float]:
            pruned = flops.prefill(model.config, prompt_tokens, pruner.schedule, pruner.scorer)
            return {"flop": pruned, "unpruned_flop": flops.prefill(model.config, prompt_tokens)}

        reference = Reference(args.reference, args.model, model.dtype)
        identity = {"method": "sdtp", "layers": args.layers, "keep_ratio": args.keep_ratio, "seed": None}
        rows = [
            {**row, **operations(row["prompt_tokens"]), **identity}
            for row in evaluate(model, examples, Fixed(pruner), settings.evaluation.batch_tokens, reference)
        ]
        write_jsonl(args.output, rows)
        for task in sorted({row["task"] for row in rows}):
            own = [row for row in rows if row["task"] == task]
            log.metrics({f"{task}/{name}": sum(row[name] for row in own) / len(own) for name in ("loss", "kl", "top1")})
        log.artifact(args.output)


def part_of(pruner: TokenPruner, layers: list[int], ratio: float) -> TokenPruner:
    """The pruner's stages before `layers` alone, each with the same ratio.

    Raises:
        UserError: it has no stage before one of the layers.
    """
    known = pruner.schedule.layers
    for layer in layers:
        if layer not in known:
            raise UserError(f"--layers: the pruner has no stage before layer {layer}; it has stages before {known}")
    part = pruner.at_stages([known.index(layer) for layer in layers])
    return part.with_schedule(part.schedule.with_ratio(ratio))
