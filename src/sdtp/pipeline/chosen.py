"""A compared method as the settings have it: each reads what it needs of them, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import methods, names
from sdtp.pipeline.config import Settings
from sdtp.pipeline.pruners import read_pruner_at, read_tuned
from sdtp.pipeline.schedules import build_schedule
from sdtp.training.saliency import Reduction, Target


def chosen_method(
    method: str,
    settings: Settings,
    model: PreTrainedModel,
    keep_ratio: float,
    pruner: Path | None,
    seed: int | None = None,
) -> methods.PrunerFor:
    """What prunes under a name of `names.METHODS`.

    Args:
        method: the name.
        settings: with the keys that `names.needs` says the method needs.
        model: eval mode, unhooked.
        keep_ratio: the fraction that each stage keeps.
        pruner: folder of the trained pruner, for what needs one; for `sdtp-tuned` of the one tuned for the keep ratio.
        seed: one of `seeds_of` the method.

    Raises:
        UserError: the pruner is missing, is not for this model or cannot be read, or its schedule is none of the
            settings'; the model has no layer to prune at; a keep ratio below 1 for a method that has no stages.
    """
    check_method(method, keep_ratio, pruner)
    needed, given = names.needs(method), dict[str, Any]()
    if "schedule" in needed:
        given["schedule"] = build_schedule(settings.pruning, model.config.num_hidden_layers, keep_ratio)
    if "pruner" in needed and pruner is not None:
        read = read_tuned if method == names.TUNED else read_pruner_at
        given["pruner"] = read(pruner, settings.pruning, model.config.num_hidden_layers, keep_ratio)
    if "layer" in needed:
        given["layer"] = settings.peers.layer
    if "cache_keep" in needed:
        given["cache_keep"] = settings.peers.cache_keep
    if "labels" in needed:  # `saliency` itself refuses other words
        given["reduction"] = cast(Reduction, settings.saliency.reduction)
        given["target"] = cast(Target, settings.saliency.target)
    return methods.make(method, model, seed=seed or 0, **given)


def seeds_of(method: str, settings: Settings) -> tuple[int | None, ...]:
    """The seeds that a method is run with, once each; None for one without random choices, which is run once."""
    return settings.evaluation.seeds if method in names.SEEDED else (None,)


def check_method(method: str, keep_ratio: float, pruner: Path | None) -> None:
    """Raise UserError where a method's pruner is missing, or its keep ratio is none it can stand at."""
    if "pruner" in names.needs(method) and pruner is None:
        raise UserError(f"--pruner is missing: method {method} needs the folder of a trained pruner")
    if names.unpruned_ratio(method) and keep_ratio != 1.0:
        raise UserError(
            f"--keep-ratio is {keep_ratio}: method {method} removes no token at a stage, so 1.0 is accepted"
        )
