"""Chooses where a pruner prunes, for a target of FLOPs, prefill time or cache size, by what held-out examples say."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import latency
from sdtp.evaluation.costs import Costs, cache_costs, flop_costs, segment_times, time_costs
from sdtp.evaluation.names import LEAST_TO_TUNE
from sdtp.evaluation.schedule_search import search
from sdtp.evaluation.stats import paired_ratios
from sdtp.evaluation.tuning import UnreachableError, geometric, level_counts
from sdtp.pipeline.damage_file import DamageFile, what_decides
from sdtp.pipeline.data_folder import SPLITS, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import digest
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import ATTENTION, load_model, read_manifest
from sdtp.pipeline.predictions import Predictions
from sdtp.pipeline.pruners import TUNING_FILE
from sdtp.pipeline.tuning import MOST_EXAMPLES, TARGETS, check_prompt, choose_examples, described, told, write
from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

# Token counts and rounds that layers are timed at, for a target of prefill time.
TIMED_LENGTHS, REPEATS = 8, 7


class _Times(TypedDict):
    """Seconds of each round by token count."""

    samples: dict[str, list[float]]


def main(argv: list[str]) -> None:
    """Run the command; `argv` are its arguments."""
    args = _parse(argv)
    started = time.monotonic()
    target = next(name for name in TARGETS if getattr(args, name) is not None)
    ratio = getattr(args, target)
    _check_output(args.output)
    try:
        pruner = TokenPruner.from_pretrained(args.pruner)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--pruner {args.pruner}: {error}") from error
    schedule, tokens = pruner.schedule, args.prompt_tokens
    check_prompt(schedule, tokens)
    check_context({"--prompt-tokens": tokens}, read_manifest(args.model).get("context_length"))
    examples = choose_examples(args.data, args.split, args.examples, schedule)
    model = load_model(args.model, args.dtype, args.attention, choose_device())
    checkpoint = args.checkpoint or args.output.with_name(f"{args.output.name}.measured.jsonl")
    try:
        with pruner(model):  # refuses a pruner that does not fit
            pass
        made_from = what_decides(model, args.model, args.pruner, args.attention)
        costs = _costs(target, model, pruner, tokens, examples.choosing, checkpoint, made_from)
        baseline = geometric(schedule, costs, ratio)  # refuses a ratio before hours of measuring
    except UnreachableError as error:
        raise UserError(
            f"--{target} {ratio:g} is out of reach for {tokens} prompt tokens: {error.least:.4f} is the least, because "
            f"layers before the first stage, {schedule.layers[0]}, keep every token and later ones those protected"
        ) from error
    except (TypeError, ValueError) as error:  # the pruner is another model's, or the model's FLOPs are not counted
        raise UserError(f"--model {args.model}: {error}") from error
    known = DamageFile(checkpoint, made_from)
    found = search(model, pruner, costs, ratio, baseline, examples.choosing, examples.reporting, known)
    given: dict[str, Any] = {
        "target": target,
        "ratio": ratio,
        "keep_ratio": None,
        "prompt_tokens": tokens,
        "model": str(args.model),
        "pruner": str(args.pruner),
        "attention": args.attention,
        "data": str(args.data),
        "split": args.split,
        "content_sha256": split_hash(args.data, args.split),
    }
    result = described(found, examples, model, pruner, given)
    if target == "latency":
        result["prefill_time"] = _prefill_times(model, pruner, found.compared, tokens, examples.choosing)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["measurements_taken_over"] = known.taken
    write(args.output, found, model, pruner, result)
    sys.stdout.write("\n".join([*told(result), f"written to {args.output}"]) + "\n")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sdtp tune-schedule",
        description=f"{__doc__} Stages stay at the layers that the scorer has weights for; one that is not worth its "
        "damage is given nothing to remove. The geometric schedule of the same cost is measured as well. It is written "
        "unless another is shown to be better on examples that took no part in the choice.",
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, of `sdtp model`")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="the pruner to tune")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of `sdtp data`")
    which = parser.add_mutually_exclusive_group(required=True)
    for name, what in TARGETS.items():
        which.add_argument(f"--{name}", type=float, metavar="RATIO", help=f"pruned / unpruned {what}, in (0, 1)")
    parser.add_argument("--prompt-tokens", required=True, type=int, metavar="N", help="prompt that the ratio is for")
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="examples to use; heldout unless given")
    parser.add_argument(
        "--examples", type=int, default=MOST_EXAMPLES, metavar="n", help=f"most to use; {MOST_EXAMPLES} unless given"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of weights"
    )
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa", help="kernel; sdpa unless given")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="JSONL",
        help="measurements, as they are made, which a later call takes over; OUTPUT.measured.jsonl unless given",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the tuned pruner")
    args = parser.parse_args(argv)
    for name in TARGETS:
        value = getattr(args, name)
        if value is not None and not 0.0 < value < 1.0:
            parser.error(f"--{name} {value}: a share of the unpruned model's, in (0, 1), is accepted")
    if args.prompt_tokens < 1:
        parser.error(f"--prompt-tokens {args.prompt_tokens}: at least 1 is needed")
    if args.examples < LEAST_TO_TUNE:
        parser.error(
            f"--examples {args.examples}: at least {LEAST_TO_TUNE} are needed, of which half report; less shows nothing"
        )
    return args


def _check_output(folder: Path) -> None:
    if folder.exists() and not (folder / TUNING_FILE).is_file():
        raise UserError(
            f"--output {folder}: is there already and holds no {TUNING_FILE}; a new folder or an older one of this"
        )


def _costs(
    target: str,
    model: PreTrainedModel,
    pruner: TokenPruner,
    tokens: int,
    examples: Sequence[dict[str, Any]],
    checkpoint: Path,
    made_from: Mapping[str, Any],
) -> Costs:
    schedule = pruner.schedule
    if target == "flops":
        return flop_costs(model.config, tokens, schedule, pruner.scorer)
    if target == "memory":
        return cache_costs(model.config, tokens, schedule)
    counts = level_counts(schedule, tokens, TIMED_LENGTHS)
    lengths = sorted(
        {int(counts[place]) for place in np.linspace(0, len(counts) - 1, TIMED_LENGTHS).round().astype(int)}
    )
    # Times differ from run to run, and with them the schedules that are measured: one that goes on takes the same.
    known = Predictions(checkpoint.with_suffix(".times.jsonl"), _Times)
    key = digest([made_from, tokens, schedule.layers[0], lengths, REPEATS])
    if key not in known:
        times = segment_times(model, _prompt(model, tokens, examples), schedule.layers[0], lengths, REPEATS)
        known.add(key, _Times(samples={str(length): list(seconds) for length, seconds in times.items()}))
    samples: dict[int, Sequence[float]] = {int(length): seconds for length, seconds in known[key]["samples"].items()}
    return time_costs(samples, tokens, schedule, len(decoder_layers(model)))


def _prompt(model: PreTrainedModel, tokens: int, examples: Sequence[dict[str, Any]]) -> torch.Tensor:
    """LongTensor [1, tokens]: the examples' prompts one after the other, over and over."""
    ids = itertools.cycle(token for example in examples for token in example["prompt_ids"])
    return torch.tensor([list(itertools.islice(ids, tokens))], device=model.device)


def _prefill_times(
    model: PreTrainedModel,
    pruner: TokenPruner,
    schedules: dict[str, PruningSchedule],
    tokens: int,
    examples: Sequence[dict[str, Any]],
) -> dict[str, list[float]]:
    """Quartiles of pruned / unpruned prefill time of whole schedules, scoring and removal included, interleaved."""
    prompt = _prompt(model, tokens, examples)
    passes = {}
    for name, schedule in schedules.items():
        timed = latency.arms(model, pruner.with_schedule(schedule), prompt, 1, latency.Stopwatch(prompt.device))
        passes.update({"unpruned": timed["unpruned"], name: timed["sdtp"]})
    samples = latency.interleave(passes, REPEATS, warmup=1)
    seconds = {name: [timing.prefill_s for timing in arm.warm] for name, arm in samples.items()}
    return {name: list(paired_ratios(seconds[name], seconds["unpruned"])) for name in schedules}
