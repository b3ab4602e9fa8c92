"""The pruner that a step reads from a folder of the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.config import PruningSettings
from sdtp.pipeline.schedules import build_schedule
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

# Beside a tuned pruner: what was measured, and what it was tuned for.
TUNING_FILE = "tuning.json"
# What the settings say of a schedule beside the keep ratio, which alone is asked for job by job.
_SHARED = ("layers", "sinks", "local", "min_local", "min_tokens", "budget")


def read_pruner(folder: Path) -> TokenPruner:
    """What `TokenPruner.save_pretrained` wrote. Raises UserError where there is no pruner, or a damaged one."""
    try:
        return TokenPruner.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


def read_pruner_at(folder: Path, pruning: PruningSettings, num_layers: int, ratio: float) -> TokenPruner:
    """The trained pruner in a folder, at a keep ratio: `read_pruner`, then `at_ratio`."""
    return at_ratio(read_pruner(folder), folder, pruning, num_layers, ratio)


def at_ratio(pruner: TokenPruner, folder: Path, pruning: PruningSettings, num_layers: int, ratio: float) -> TokenPruner:
    """A trained pruner at a keep ratio, the one thing in which its own schedule may be another than the settings'.

    Args:
        pruner: as it was trained; the result shares its scorer.
        folder: it was read from, which errors name.
        pruning: where it has to prune, and what it has to protect.
        num_layers: of the model.
        ratio: what each stage keeps of what reaches it, in (0, 1].

    Raises:
        UserError: stages at other layers, with other protected tokens, or that do not keep equal shares, which a keep
            ratio would replace.
    """
    asked = build_schedule(pruning, num_layers, ratio)
    _check_shared(folder, pruner.schedule, asked)
    if not _is_geometric(pruner.schedule):
        left = ", ".join(f"{fraction:.3g}" for fraction in pruner.schedule.keep)
        raise UserError(
            f"{folder}: the stages of this pruner leave {left} of a prompt, which are no equal shares, so that a keep "
            f"ratio, {ratio}, would replace what was chosen for them; accepted: a pruner as `sdtp train` writes it, or "
            "method sdtp-tuned for one that was tuned"
        )
    return pruner.with_schedule(asked)


def read_tuned(folder: Path, pruning: PruningSettings, num_layers: int, ratio: float) -> TokenPruner:
    """A pruner whose schedule was tuned to cost what equal shares of `ratio` do; arguments as of `at_ratio`.

    Raises:
        UserError: no pruner or a damaged one; one that was not tuned for this keep ratio; one with stages at other
            layers or with other protected tokens than the settings'.
    """
    pruner, told = read_pruner(folder), folder / TUNING_FILE
    try:
        tuned_for = json.loads(told.read_text("utf-8"))["keep_ratio"]
    except FileNotFoundError as error:
        raise UserError(f"{folder}: has no {TUNING_FILE}; method sdtp-tuned needs a pruner that was tuned") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{told}: says no keep_ratio; it was not tuned for one, or the file is damaged") from error
    if tuned_for != ratio:
        raise UserError(f"{told}: keep_ratio is {tuned_for}; a pruner that was tuned for {ratio} is needed")
    _check_shared(folder, pruner.schedule, build_schedule(pruning, num_layers, ratio))
    return pruner


def _check_shared(folder: Path, own: PruningSchedule, asked: PruningSchedule) -> None:
    unlike = [
        f"{name} {getattr(own, name)} and not {getattr(asked, name)}"
        for name in _SHARED
        if getattr(own, name) != getattr(asked, name)
    ]
    if unlike:
        raise UserError(
            f"{folder}: the schedule of this pruner is another than that of the settings, block pruning: "
            f"{', '.join(unlike)}; only the keep ratio may differ"
        )


def _is_geometric(schedule: PruningSchedule) -> bool:
    """Whether each stage keeps the same share of what reaches it."""
    equal = schedule.with_ratio(schedule.keep[0]).keep
    return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(schedule.keep, equal, strict=True))
