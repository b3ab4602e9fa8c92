"""What is around the search for a schedule: its examples, the folder of what it finds, and what people are told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.names import LEAST_REPORTED, LEAST_TO_TUNE
from sdtp.evaluation.schedule_search import Found
from sdtp.evaluation.tuning import floor
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import atomic_folder
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.pruners import TUNING_FILE
from sdtp.pipeline.tasks import COUNT_KEYS
from sdtp.pipeline.tuning_plot import tuning
from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

TARGETS = {"flops": "prefill FLOPs", "latency": "prefill time", "memory": "bytes of the KV cache"}
FIGURE = "tuning"
# Every stage is run at each fraction on half of them.
MOST_EXAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of a split, `prompt_ids`, `response_ids` and `task` among their columns.

    Attributes:
        choosing: to choose with.
        reporting: to report on.
        too_short: rows that are neither, since nothing can be removed from them.
    """

    choosing: list[dict[str, Any]]
    reporting: list[dict[str, Any]]
    too_short: int

    def described(self) -> dict[str, Any]:
        """How many of each task."""
        tasks = {half: Counter(row["task"] for row in getattr(self, half)) for half in ("choosing", "reporting")}
        return {**{half: dict(counts) for half, counts in tasks.items()}, "too_short": self.too_short}


def check_prompt(schedule: PruningSchedule, tokens: int) -> None:
    """Raise UserError for a prompt length at which the pruner removes nothing whatever its fractions."""
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


def choose_examples(data: Path, split: str, count: int, schedule: PruningSchedule) -> Examples:
    """Examples to choose with, and others to report on.

    Tasks take turns, in the order of the split, so that they are as equal in number as the split allows; each task's
    are dealt to the two lists in turn.

    Raises:
        UserError: too few for a difference to be shown, whatever it is, or a task with a single one.
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
    if len(reporting) < LEAST_REPORTED or single:
        raise UserError(
            f"--data {data}: {len(taken)} examples of {split} can be used{_only_one(single)} ({len(lengths)} rows, "
            f"{left_out} too short to prune, at most {count} asked for), {len(choosing)} to choose with and "
            f"{len(reporting)} to report on; fewer than {LEAST_REPORTED} reported can show no difference at 95%, and "
            f"a task needs one for either: {COUNT_KEYS[split]} of {LEAST_TO_TUNE} or more gives them"
        )
    return Examples(choosing, reporting, left_out)


def _only_one(tasks: Collection[str]) -> str:
    return f", only one of {', '.join(sorted(tasks))}" if tasks else ""


def described(
    found: Found, examples: Examples, model: PreTrainedModel, pruner: TokenPruner, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a search found, as `tuning.json` has it.

    Args:
        found: of the search.
        examples: it was made on.
        model: as it was run.
        pruner: the one that was tuned.
        given: what was asked for: `target`, `ratio`, `keep_ratio` or None, `prompt_tokens`, and where things came from.
    """
    return {
        **given,
        "scorer": type(pruner.scorer).__name__,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "examples": examples.described(),
        **dataclasses.asdict(found),
        "chosen": found.chosen,
    }


def write(output: Path, found: Found, model: PreTrainedModel, pruner: TokenPruner, result: Mapping[str, Any]) -> None:
    """Write the folder: the pruner with the schedule that was chosen, `tuning.json`, and the figure.

    Args:
        output: the folder; one that is there is replaced.
        found: of the search.
        model: whose layers the figure shows.
        pruner: the one that was tuned.
        result: of `described`, and what the caller adds to it.
    """
    tokens = result["prompt_tokens"]
    lengths = {name: one.layer_lengths(tokens, len(decoder_layers(model))) for name, one in found.compared.items()}
    curves = {
        stage["layer"]: [(point["kept_share"], point["kl"], *point["kl_interval"]) for point in stage["points"]]
        for stage in found.stages
    }
    figure = tuning(curves, lengths, tokens, sum(result["examples"]["choosing"].values()))
    with atomic_folder(output) as folder:
        pruner.with_schedule(found.compared[found.chosen]).save_pretrained(folder)
        (folder / TUNING_FILE).write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", "utf-8")
        save(figure, folder / FIGURE)


def _finite(value: Any) -> Any:
    """The same in JSON values: null for a number that is not finite, as intervals of one example are."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(result: Mapping[str, Any]) -> list[str]:
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
