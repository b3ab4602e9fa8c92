"""Which setting of a finished run meets a target in time, memory or quality, and on what evidence."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.evaluation.methods import baseline_scorer
from sdtp.evaluation.recommendation import UNPRUNED, Recommendation, Setting, Target, cost_at, recommend
from sdtp.pipeline.formats import memory, number
from sdtp.pipeline.measured import METHODS, Measured, command, read
from sdtp.pipeline.results import few, smoke
from sdtp.pipeline.steps.report import timed_on
from sdtp.pipeline.tables import TASK_METRICS

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was asked, what was found, and on what.

    Attributes:
        args: the arguments.
        target: what they ask for.
        measured: what the run holds.
        settings: unpruned, then what prunes, the largest keep ratio first, at one prompt length.
        found: which of them.
        timed_on: machine, dtype, attention kernel and versions.
    """

    args: argparse.Namespace
    target: Target
    measured: Measured
    settings: list[Setting]
    found: Recommendation
    timed_on: str


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments. Exits with 1 where no setting meets the target."""
    parser = argparse.ArgumentParser(
        prog="sdtp recommend",
        description=f"{__doc__} For time and memory the setting that keeps most quality is chosen, for quality the "
        "fastest. Exits with 1 where none meets the target.",
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the run's folder, as results/default")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--ttft", type=float, metavar="SECONDS", help="longest time to first token, which is the prefill"
    )
    which.add_argument("--ttft-ratio", type=float, metavar="R", help="the same as a share of the unpruned time")
    which.add_argument("--memory", metavar="BYTES", help="largest peak, weights included: 1200000000, 1200MB, 1.1GiB")
    which.add_argument("--quality", type=float, metavar="KEPT", help="least share of the unpruned quality, up to 1")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="prompt length; the longest timed unless given")
    parser.add_argument("--task", choices=TASK_METRICS, help="whose quality counts; every task's unless given")
    parser.add_argument("--method", choices=METHODS, default="sdtp", help="what prunes; sdtp unless given")
    parser.add_argument("--json", action="store_true", help="print JSON, with every setting")
    args = parser.parse_args(argv)
    target = _target(parser, args)
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        parser.error(f"--prompt-tokens {args.prompt_tokens}: at least 1 is needed")
    measured = read(args.run, args.method, args.task)
    settings = _settings(args, measured)
    if target.kind == "memory" and any(math.isnan(setting.cost.peak_memory_bytes) for setting in settings):
        raise UserError(f"--memory: {args.run / 'tables/latency.csv'} holds no peak memory; times and quality it does")
    machine, _ = timed_on(measured.benchmarks)
    answer = Answer(args, target, measured, settings, recommend(settings, target), machine)
    told = json.dumps(_plain(answer), indent=2, allow_nan=False) if args.json else "\n".join(_text(answer))
    sys.stdout.write(told + "\n")
    if answer.found.chosen is None:
        raise SystemExit(1)


def _target(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Target:
    if args.memory is not None:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]I?|)B?", args.memory.strip(), re.IGNORECASE)
        if found is None or float(found[1]) == 0:
            parser.error(f"--memory {args.memory}: bytes are needed, as 1200000000, 1200MB or 1.1GiB")
        return Target("memory", float(found[1]) * UNITS[found[2].upper()])
    if args.ttft is not None:
        if not 0 < args.ttft < math.inf:
            parser.error(f"--ttft {args.ttft:g}: seconds above 0 are needed")
        return Target("ttft", args.ttft)
    name, share = ("--quality", args.quality) if args.quality is not None else ("--ttft-ratio", args.ttft_ratio)
    if not 0 < share <= 1:
        parser.error(f"{name} {share:g}: a share above 0 and up to 1 is needed")
    return Target("quality" if name == "--quality" else "ttft_ratio", share)


def _settings(args: argparse.Namespace, measured: Measured) -> list[Setting]:
    """The settings at the prompt length asked for; UserError where it lies outside the measured ones."""
    lengths = sorted(cost.prompt_tokens for cost in measured.costs[UNPRUNED, 1.0])
    tokens = args.prompt_tokens or lengths[-1]
    try:
        settings = [
            Setting(method, ratio, cost_at(costs, tokens), measured.kept[method, ratio])
            for (method, ratio), costs in measured.costs.items()
        ]
    except ValueError as error:
        longer = f"benchmark: {{prompt_tokens: {sorted({*lengths, tokens})}}}"
        make = command(args.run, "tables/latency.csv", "lengths.yaml")
        raise UserError(f"--prompt-tokens: {error}; `echo '{longer}' > lengths.yaml && {make}` measures it") from error
    return sorted(settings, key=lambda setting: (setting.method != UNPRUNED, -setting.keep_ratio))


def _notes(answer: Answer) -> list[str]:
    """What limits the evidence, in sentences."""
    cost, notes = answer.settings[0].cost, list(answer.measured.doubts)
    shortest, longest = answer.measured.quality_tokens
    if not shortest <= cost.prompt_tokens <= longest:
        lengths = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        notes.append(
            f"quality was measured on prompts of {lengths} tokens, which says little about {cost.prompt_tokens} tokens"
        )
    if cost.between is not None:
        notes.append(
            f"prompts of {cost.prompt_tokens} tokens were not timed: their numbers are interpolated between those of "
            f"{cost.between[0]} and of {cost.between[1]} tokens"
        )
    fewest = min(kept.n for kept in answer.settings[0].kept.values())
    if few(fewest):
        notes.append(f"{smoke(fewest)} examples a task, too few to tell small losses")
    if answer.args.method != "sdtp":
        notes.append(f"times are of pruning with the learned scorer; {answer.args.method}'s own scoring was not timed")
    return notes


def _python(run: Path, setting: Setting) -> list[str]:
    """The lines that use a setting on a loaded `model`."""
    if setting.method == UNPRUNED:
        return ["output = model.generate(**inputs)"]
    pruner = f'TokenPruner.from_pretrained("{run / "pruner"}")'
    if setting.method != "sdtp":
        pruner = f"TokenPruner({pruner}.schedule, scorers.{baseline_scorer(setting.method)!r})"
    return [f"pruner = {pruner}", f"with pruner(model, ratio={setting.keep_ratio}): output = model.generate(**inputs)"]


def _amount(target: Target, value: float) -> str:
    if target.kind == "ttft":
        return f"{number(value)} s"
    return memory(value) if target.kind == "memory" else number(value)


def _asked(answer: Answer) -> str:
    limit, tokens = _amount(answer.target, answer.target.limit), answer.settings[0].cost.prompt_tokens
    asked = {
        "ttft": f"time to first token up to {limit}",
        "ttft_ratio": f"time to first token up to {limit} of the unpruned",
        "memory": f"peak memory up to {limit}",
        "quality": f"{answer.args.task or 'every task'} keeps at least {limit} of the unpruned quality",
    }[answer.target.kind]
    return f"{asked}, prompts of {tokens} tokens{'' if answer.args.prompt_tokens else ', the longest timed'}"


def _verdict(answer: Answer, setting: Setting) -> str:
    unpruned, miss = answer.settings[0], answer.target.miss(setting)
    if miss > 0:
        return f"misses by {_amount(answer.target, miss)}"
    if answer.target.kind == "quality" and setting is not unpruned and setting.cost.ttft_s >= unpruned.cost.ttft_s:
        return "no faster than unpruned"
    return "meets it"


def _text(answer: Answer) -> list[str]:
    """The answer for people: the choice, how to use it, its row and its neighbours', what they were measured on."""
    run, setting = answer.args.run, answer.found.closest
    name = setting.method if setting.method == UNPRUNED else f"{setting.method} at keep ratio {setting.keep_ratio}"
    lines = [f"target  {_asked(answer)}"]
    if answer.found.chosen is None:
        lines += [f"choice  none: the closest, {name}, {_verdict(answer, setting)}"]
    else:
        of = "no pruning is needed" if setting.method == UNPRUNED else f"the pruner is {run / 'pruner'}"
        lines += [f"choice  {name}; {of}", "", *(f"    {line}" for line in _python(run, setting))]
    lines += ["", *_evidence(answer), ""]
    lines.append("time: median (quartiles) of the repeats; the upper one counts")
    lines.append("kept: share of the unpruned quality on the same examples (95% interval); the lower bound counts")
    lines.append(f"timed on {answer.timed_on}")
    return [*lines, *(f"note: {note}" for note in _notes(answer))]


def _evidence(answer: Answer) -> list[str]:
    """A line for the chosen or closest setting and one for each neighbour."""
    place = next(index for index, setting in enumerate(answer.settings) if setting is answer.found.closest)
    tasks = [f"{task} kept" for task in answer.settings[0].kept]
    rows = [["", "setting", "time to first token, s", "repeats", "of unpruned", "peak memory", "KV cache", *tasks, ""]]
    for setting in answer.settings[max(0, place - 1) : place + 2]:
        cost = setting.cost
        rows.append(
            [
                ">" if setting is answer.found.chosen else "",
                UNPRUNED if setting.method == UNPRUNED else f"{setting.keep_ratio}",
                f"{number(cost.ttft_s)} ({number(cost.ttft_q25)}–{number(cost.ttft_q75)})",
                f"{cost.repeats}",
                f"{number(cost.ttft_ratio)} (≤ {number(cost.ttft_ratio_q75)})",
                memory(cost.peak_memory_bytes),
                memory(cost.kv_cache_bytes),
                *(
                    f"{number(kept.value)} ({number(kept.low)}–{number(kept.high)}), n = {kept.n}"
                    for kept in setting.kept.values()
                ),
                _verdict(answer, setting),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(answer: Answer) -> dict[str, Any]:
    """The answer for programs; a number that is not finite is null."""
    chosen, closest, run = answer.found.chosen, answer.found.closest, answer.args.run
    return {
        "target": {
            **dataclasses.asdict(answer.target),
            "prompt_tokens": answer.settings[0].cost.prompt_tokens,
            "task": answer.args.task,
        },
        "met": chosen is not None,
        "method": None if chosen is None else chosen.method,
        "keep_ratio": None if chosen is None else chosen.keep_ratio,
        "pruner": None if chosen is None or chosen.method == UNPRUNED else str(run / "pruner"),
        "python": [] if chosen is None else _python(run, chosen),
        "closest": {"method": closest.method, "keep_ratio": closest.keep_ratio, "miss": answer.found.miss},
        "settings": [_finite(dataclasses.asdict(setting)) for setting in answer.settings],
        "timed_on": answer.timed_on,
        "quality_prompt_tokens": answer.measured.quality_tokens,
        "notes": _notes(answer),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
