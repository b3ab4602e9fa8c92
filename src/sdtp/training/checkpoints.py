"""Resumable training state on disk: whole or absent, and used only by the run it belongs to."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from sdtp.disk import naming, other_states, remove_temporaries_in, state_folder, sync, temporary_sibling

logger = logging.getLogger(__name__)

# Of a training, in the order in which they follow one another; each counts steps of its own.
LABELS, STEPS = "labels", "step"
_TENSORS, _STATE = "state.safetensors", "state.json"
# Where the state has its own checksum, of all the rest of it.
_CHECKSUM = "state_sha256"
# The newest checkpoint, and the one before it in case the newest turns out damaged.
_KEPT = 2


class Checkpoints:
    """A folder of checkpoints, each tensors (safetensors) and a JSON state; nothing is pickled.

    `labels-<number>` is one of the label epochs, `step-<number>` one of the optimizer steps that follow them. Trainings
    with other fingerprints have folders of their own beside it: a setting changed and changed back costs nothing.

    Args:
        folder: of all trainings that write the same pruner; made where missing.
        fingerprint: hash of the settings and inputs, in hexadecimal; a checkpoint with another one is never loaded.

    Attributes:
        folder: of this fingerprint's checkpoints.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = state_folder(folder, fingerprint)
        self.fingerprint = fingerprint

    def save(self, part: str, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint under a temporary name, rename it into place, and drop all but the last two.

        Args:
            part: `LABELS` or `STEPS`.
            step: optimizer steps done, or label epochs.
            tensors: what is stored as tensors, by name.
            state: JSON values.

        Returns:
            The checkpoint's folder.
        """
        final = self.folder / f"{part}-{step:08d}"
        with naming(final):
            self._write(final, tensors, {"part": part, "step": step, **state})
        for old in self._newest_first()[_KEPT:]:
            shutil.rmtree(old)
        return final

    def _write(self, final: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries_in(self.folder)  # of a run that was killed here
        temporary = temporary_sibling(final)
        temporary.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / _TENSORS)
        state = {"fingerprint": self.fingerprint, "tensors_sha256": _sha256(temporary / _TENSORS), **state}
        text = json.dumps({_CHECKSUM: _state_sha256(state), **state})
        (temporary / _STATE).write_text(text + "\n", encoding="utf-8")
        for name in (_TENSORS, _STATE):
            sync(temporary / name)
        shutil.rmtree(final, ignore_errors=True)  # damaged, else it would have been resumed
        os.rename(temporary, final)
        sync(self.folder)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and state of the newest checkpoint that is whole and of this fingerprint; None if there is none.

        The state has `part` and `step` as well, which `save` was given.
        """
        for path in self._newest_first():
            try:
                state = _whole_state(path)
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s is damaged and not used: %s", path, error)
                continue
            if state["fingerprint"] != self.fingerprint:
                logger.info("checkpoint %s belongs to other settings or inputs and is not used", path)
            else:
                # Read, not mapped: a training holds them until it ends, and a network file system keeps the folder of a
                # mapped file from being removed.
                return load((path / _TENSORS).read_bytes()), state
        return None

    def clear(self) -> None:
        """Remove every checkpoint of this fingerprint: what follows starts anew."""
        for path in self._newest_first():
            shutil.rmtree(path)

    def others(self) -> list[Path]:
        """The folders of trainings with other fingerprints."""
        return other_states(self.folder)

    def clear_others(self) -> None:
        """Remove those folders."""
        for path in self.others():
            shutil.rmtree(path)

    def _newest_first(self) -> list[Path]:
        return [path for part in (STEPS, LABELS) for path in sorted(self.folder.glob(f"{part}-*"), reverse=True)]


def snapshot(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LRScheduler,
    best: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything training goes on from besides its seed and step, as tensors and JSON values.

    No random generator is among it: every random number of a training is keyed by seed, epoch, example and stage.
    `best` holds the weights of the best evaluation, by name; none where they are not asked for.
    """
    saved = optimizer.state_dict()
    tensors = {f"module/{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for index, values in saved["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    return tensors, {"groups": saved["param_groups"], "rates": rates.state_dict()}


def restore(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LRScheduler,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """The inverse of `snapshot`; returns `best`."""
    weights: dict[str, torch.Tensor] = {}
    best: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "module":
            weights[name] = value
        elif kind == "best":
            best[name] = value
        else:
            index, _, name = name.partition("/")
            moments.setdefault(int(index), {})[name] = value
    module.load_state_dict(weights)
    optimizer.load_state_dict({"state": moments, "param_groups": state["groups"]})
    rates.load_state_dict(state["rates"])
    return best


def _whole_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, as it was written.

    Raises:
        OSError, ValueError: the checkpoint is damaged, its tensors or its state.
    """
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.pop(_CHECKSUM, None) != _state_sha256(state):
        raise ValueError(f"{_STATE} does not match its checksum")
    if state["tensors_sha256"] != _sha256(folder / _TENSORS):
        raise ValueError(f"{_TENSORS} does not match its checksum")
    return state


def _state_sha256(state: dict[str, Any]) -> str:
    # Written again, what was read from JSON is the same text: keys in their order, numbers to the last digit.
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
