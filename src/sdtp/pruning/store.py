"""A pruner on disk: `pruner.json` for settings, `pruner.safetensors` for weights; nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdtp.pruning import scorers
from sdtp.pruning.schedule import PruningSchedule

SETTINGS, WEIGHTS = "pruner.json", "pruner.safetensors"
_FORMAT = 1
_PLAIN = {cls.__name__: cls for cls in (scorers.Random, scorers.Recent, scorers.HiddenNorm, scorers.LastQuery)}


def save(folder: Path, schedule: PruningSchedule, scorer: scorers.Scorer) -> None:
    """Write a schedule and a scorer; see `TokenPruner.save_pretrained`."""
    if isinstance(scorer, scorers.Learned):
        described = {
            "kind": "Learned",
            "hidden_size": scorer.hidden_size,
            "stages": scorer.stages,
            "width": scorer.width,
        }
    elif type(scorer).__name__ in _PLAIN:
        described = {"kind": type(scorer).__name__, **dataclasses.asdict(scorer)}  # type: ignore[call-overload]
    else:
        raise ValueError(f"{type(scorer).__name__} cannot be saved: accepted are Learned, {', '.join(_PLAIN)}")
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(scorer, scorers.Learned):
        save_file({name: value.contiguous().cpu() for name, value in scorer.state_dict().items()}, folder / WEIGHTS)
    text = json.dumps({"format": _FORMAT, "schedule": schedule.to_dict(), "scorer": described}, indent=2)
    (folder / SETTINGS).write_text(text + "\n")


def load(folder: Path) -> tuple[PruningSchedule, scorers.Scorer]:
    """Read a schedule and a scorer; see `TokenPruner.from_pretrained`."""
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
        if settings["format"] != _FORMAT:
            raise ValueError(f"format is {settings['format']!r}: {_FORMAT} is accepted")
        schedule = PruningSchedule.from_dict(settings["schedule"])
        described = dict(settings["scorer"])
        kind = described.pop("kind")
        if kind == "Learned":
            return schedule, _learned(folder / WEIGHTS, scorers.Learned(**described))
        if kind not in _PLAIN:
            raise ValueError(f"scorer.kind is {kind!r}: accepted are Learned, {', '.join(_PLAIN)}")
        return schedule, _PLAIN[kind](**described)
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_words(error)}") from error


def _learned(path: Path, scorer: scorers.Learned) -> scorers.Learned:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({error})") from error
    expected = {name: tuple(value.shape) for name, value in scorer.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path.name}: tensor {name} has shape {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none')}"
            )
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{path.name}: tensor {name} holds values that are not finite")
    scorer.load_state_dict(weights)
    return scorer.eval().requires_grad_(False)


def _words(error: Exception) -> Any:
    return f"key {error} is missing" if isinstance(error, KeyError) else error
