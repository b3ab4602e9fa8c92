"""The pruner that the model arguments of lm-evaluation-harness ask for."""

from __future__ import annotations

from pathlib import Path

from sdtp.errors import UserError
from sdtp.evaluation.methods import BASELINES, baseline_scorer
from sdtp.evaluation.names import SEEDED
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule


def read_pruner(pruner: str | TokenPruner | None, num_layers: int, **settings: float | None) -> TokenPruner | None:
    """The pruner that model arguments ask for.

    Args:
        pruner: a folder of `TokenPruner.save_pretrained`, a name in `methods.BASELINES`, a pruner, or None.
        num_layers: decoder layers of the model.
        **settings: `keep_ratio`, in (0, 1], is the fraction kept at each stage of what the stage before left; of a
            trained pruner it replaces the schedule's own numbers. A plain method needs it, and the stages' layers
            `start` and `step`, and takes `sinks`, `local`, `min_local` and `min_tokens` of `PruningSchedule.geometric`
            and, where it chooses at random, `seed`. None stands for not given.

    Raises:
        UserError: no such pruner, or a setting that is missing or that it does not take.
        ValueError: a setting out of its range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if pruner is None:
        if given:
            raise UserError(f"{_listed(given)} without a pruner: nothing would be pruned, give pruner=")
        return None
    if not isinstance(pruner, str) or pruner not in BASELINES:
        if isinstance(pruner, str):
            if not Path(pruner).is_dir():
                raise UserError(f"pruner={pruner} is neither a folder nor one of {', '.join(BASELINES)}")
            pruner = TokenPruner.from_pretrained(pruner)
        ratio = given.pop("keep_ratio", None)
        if given:
            raise UserError(f"{_listed(given)} cannot be set: the pruner has a schedule, of which keep_ratio can be")
        return pruner if ratio is None else pruner.with_schedule(pruner.schedule.with_ratio(ratio))
    missing = [name for name in ("keep_ratio", "start", "step") if name not in given]
    if missing:
        raise UserError(f"pruner={pruner} needs {', '.join(missing)} as well: it has no schedule of its own")
    seed = given.pop("seed", 0) if pruner in SEEDED else 0
    if "seed" in given:
        raise UserError(f"seed={given['seed']} means nothing to pruner={pruner}: only {', '.join(SEEDED)} has one")
    schedule = PruningSchedule.geometric(num_layers, ratio=given.pop("keep_ratio"), **given)  # type: ignore[arg-type]
    return TokenPruner(schedule, baseline_scorer(pruner, int(seed)))


def _listed(given: dict[str, float]) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items())
