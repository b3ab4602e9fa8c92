"""Chooses where a pruner prunes, for a target of FLOPs, prefill time or cache size, by what held-out examples say."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import latency
from sdtp.evaluation.costs import Costs, cache_costs, flop_costs, segment_times, time_costs
from sdtp.evaluation.schedule_search import search
from sdtp.evaluation.stats import paired_ratios
from sdtp.evaluation.tuning import UnreachableError, floor, geometric, level_counts
from sdtp.pipeline.data import SPLITS, load_split, split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import atomic_folder
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import ATTENTION, load_model, read_manifest
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.tuning_plot import tuning
from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

TARGETS = {"flops": "prefill FLOPs", "latency": "prefill time", "memory": "bytes of the KV cache"}
# Token counts and rounds that layers are timed at, for a target of prefill time.
TIMED_LENGTHS, REPEATS = 8, 7
FILE, FIGURE = "tuning.json", "tuning"


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
    _check_prompt(schedule, tokens)
    check_context({"--prompt-tokens": tokens}, read_manifest(args.model).get("context_length"))
    choosing, reporting, too_short = choose_examples(args.data, args.split, args.examples, schedule)
    model = load_model(args.model, args.dtype, args.attention, choose_device())
    try:
        with pruner(model):  # refuses a pruner that does not fit
            pass
        costs = _costs(target, model, pruner, tokens, choosing)
        geometric(schedule, costs, ratio)  # refuses a ratio before hours of measuring
    except UnreachableError as error:
        raise UserError(
            f"--{target} {ratio:g} is out of reach for {tokens} prompt tokens: {error.least:.4f} is the least, because "
            f"layers before the first stage, {schedule.layers[0]}, keep every token and later ones those protected"
        ) from error
    except (TypeError, ValueError) as error:  # the pruner is another model's, or the model's FLOPs are not counted
        raise UserError(f"--model {args.model}: {error}") from error
    found = search(model, pruner, costs, ratio, choosing, reporting)
    result: dict[str, Any] = {
        "target": target,
        "ratio": ratio,
        "prompt_tokens": tokens,
        "model": str(args.model),
        "pruner": str(args.pruner),
        "scorer": type(pruner.scorer).__name__,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attention,
        "data": str(args.data),
        "split": args.split,
        "content_sha256": split_hash(args.data, args.split),
        "examples": {"choosing": _tasks(choosing), "reporting": _tasks(reporting), "too_short": too_short},
        **dataclasses.asdict(found),
        "chosen": found.chosen,
    }
    if target == "latency":
        result["prefill_time"] = _prefill_times(model, pruner, found.compared, tokens, choosing)
    result["seconds"] = round(time.monotonic() - started, 1)
    lengths = {name: one.layer_lengths(tokens, len(decoder_layers(model))) for name, one in found.compared.items()}
    _write(args.output, pruner.with_schedule(found.compared[found.chosen]), result, lengths)
    sys.stdout.write("\n".join([*_told(result), f"written to {args.output}"]) + "\n")


def _tasks(examples: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(example["task"] for example in examples))


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
    parser.add_argument("--examples", type=int, default=64, metavar="n", help="most examples to use; 64 unless given")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of weights"
    )
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa", help="kernel; sdpa unless given")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the tuned pruner")
    args = parser.parse_args(argv)
    for name in TARGETS:
        value = getattr(args, name)
        if value is not None and not 0.0 < value < 1.0:
            parser.error(f"--{name} {value}: a share of the unpruned model's, in (0, 1), is accepted")
    if args.prompt_tokens < 1:
        parser.error(f"--prompt-tokens {args.prompt_tokens}: at least 1 is needed")
    if args.examples < 4:
        parser.error(f"--examples {args.examples}: at least 4 are needed, two to choose with and two to report on")
    return args


def _check_output(folder: Path) -> None:
    if folder.exists() and not (folder / FILE).is_file():
        raise UserError(
            f"--output {folder}: is there already and holds no {FILE}; a new folder or an older one of this"
        )


def _check_prompt(schedule: PruningSchedule, tokens: int) -> None:
    """Refuse a prompt length at which the pruner removes nothing whatever its fractions."""
    if not schedule.stages:
        raise UserError("--pruner: it has no stages; one that prunes somewhere is needed")
    if not _prunable(schedule, tokens):
        raise UserError(
            f"--prompt-tokens {tokens}: nothing can be removed from so short a prompt; {floor(schedule, tokens)} "
            f"tokens are protected (sinks {schedule.sinks}, local {schedule.local:g}, min_local {schedule.min_local}), "
            f"and below {schedule.min_tokens} (min_tokens) a prompt is left alone"
        )


def _prunable(schedule: PruningSchedule, tokens: int) -> bool:
    return tokens >= schedule.min_tokens and floor(schedule, tokens) < tokens


def choose_examples(
    data: Path, split: str, count: int, schedule: PruningSchedule
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Examples to choose with, others to report on, and how many were too short to be pruned at all.

    Tasks take turns, in the order of the split, so that they are as equal in number as the split allows; each task's
    are dealt to the two lists in turn.

    Raises:
        UserError: the split has none, or a task with a single one.
    """
    dataset = load_split(data, split)
    lengths = [len(ids) for ids in dataset["prompt_ids"]]
    queues: dict[str, list[int]] = {}
    for index, task in enumerate(dataset["task"]):
        if _prunable(schedule, lengths[index]):
            queues.setdefault(task, []).append(index)
    left_out = len(lengths) - sum(map(len, queues.values()))
    turns = enumerate(itertools.zip_longest(*queues.values()))
    taken = [(index, turn) for turn, row in turns for index in row if index is not None][:count]
    halves = [[index for index, turn in taken if turn % 2 == half] for half in (0, 1)]
    choosing, reporting = (dataset.select(half).to_list() for half in halves)
    single = {example["task"] for example in choosing} - {example["task"] for example in reporting}
    if len(reporting) < 2 or single:
        raise UserError(
            f"--data {data}: {len(taken)} examples of {split} can be used{_only_one(single)} ({len(lengths)} rows, "
            f"{left_out} too short to prune, at most {count} asked for); half of them choose, half are reported on, "
            "and two at least, one at least of each task, are needed for either"
        )
    return choosing, reporting, left_out


def _only_one(tasks: Collection[str]) -> str:
    return f", only one of {', '.join(sorted(tasks))}" if tasks else ""


def _costs(
    target: str, model: PreTrainedModel, pruner: TokenPruner, tokens: int, examples: Sequence[dict[str, Any]]
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
    times = segment_times(model, _prompt(model, tokens, examples), schedule.layers[0], lengths, REPEATS)
    return time_costs(times, tokens, schedule, len(decoder_layers(model)))


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


def _write(output: Path, pruner: TokenPruner, result: dict[str, Any], lengths: dict[str, list[int]]) -> None:
    curves = {
        stage["layer"]: [(point["kept_share"], point["kl"], *point["kl_interval"]) for point in stage["points"]]
        for stage in result["stages"]
    }
    figure = tuning(curves, lengths, result["prompt_tokens"], sum(result["examples"]["choosing"].values()))
    with atomic_folder(output) as folder:
        pruner.save_pretrained(folder)
        (folder / FILE).write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", "utf-8")
        save(figure, folder / FIGURE)


def _finite(value: Any) -> Any:
    """The same in JSON values: null for a number that is not finite, as intervals of one example are."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(result: dict[str, Any]) -> list[str]:
    """The outcome, in lines for people."""
    target, tokens, best = TARGETS[result["target"]], result["prompt_tokens"], result["best"]
    lines = [
        f"{target}: {result['ratio']:g} of the unpruned model's, for {tokens} prompt tokens",
        "",
        f"{'schedule':<12}{'cost':>8}{'predicted KL':>14}{'KL':>9}{'loss':>9}   tokens left",
    ]
    for name, row in result["candidates"].items():
        left = ", ".join(map(str, row["survivors"]))
        numbers = f"{row['cost']:>8.4f}{row['predicted_kl']:>14.4f}{row['kl']:>9.4f}{row['loss']:>+9.4f}"
        lines.append(f"{name:<12}{numbers}   {left}")
    lines.append("")
    if result["difference"] is None:
        lines.append("no schedule has a lower mean KL than the geometric one")
    else:
        n = sum(result["examples"]["reporting"].values())
        lines.append(f"{best} minus geometric on {n} other examples, in nats a token, with 95% intervals")
        for field, what in (("kl", "KL"), ("loss", "loss")):
            one = result["difference"][field]
            lines.append(f"  {what:<5}{one['mean']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})")
    for name, (low, middle, high) in result.get("prefill_time", {}).items():
        lines.append(f"measured prefill time, {name}: {middle:.3f} of unpruned (quartiles {low:.3f}, {high:.3f})")
    if result["chosen"] == "tuned":
        return [*lines, f"{best} is better than the geometric schedule: it is chosen"]
    return [*lines, "nothing is shown to be better than the geometric schedule: that one is chosen"]
