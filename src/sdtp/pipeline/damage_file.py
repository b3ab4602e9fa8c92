"""Damage that is measured once: of each schedule on each example, under a hash of all that decides it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel

from sdtp.evaluation.damage import Damage
from sdtp.pipeline.codehash import code_hash
from sdtp.pipeline.files import digest
from sdtp.pipeline.libraries import LIBRARIES
from sdtp.pipeline.predictions import Predictions, model_digest, pruner_digest
from sdtp.pruning.schedule import PruningSchedule

# What runs the model and compares its predictions. How a schedule is searched for decides nothing about a measurement.
_CODE = ("sdtp.evaluation.damage", "sdtp.pipeline.models")


class _Row(TypedDict):
    kl: float
    loss: float
    kept_share: float


def what_decides(model: PreTrainedModel, folder: Path, pruner: Path, attention: str) -> dict[str, Any]:
    """All that decides a measurement beside its example and schedule, as a JSON value.

    Args:
        model: as it is run.
        folder: it was read from.
        pruner: folder of the one whose scorer decides.
        attention: kernel.
    """
    cuda = model.device.type == "cuda"
    return {
        "model": model_digest(folder),
        "pruner": pruner_digest(pruner),
        "dtype": str(model.dtype),
        "attention": attention,
        "device": torch.cuda.get_device_name(model.device) if cuda else model.device.type,
        "code": [code_hash(module) for module in _CODE],
        "libraries": LIBRARIES,
    }


class DamageFile:
    """`sdtp.evaluation.damage.Measurements` in a file.

    Args:
        path: of the file, made with the first measurement.
        made_from: of `what_decides`; measurements of anything else are not found.
        others: files of the same kind, which are read as well and never written.
    """

    def __init__(self, path: Path, made_from: Any, others: Collection[Path] = ()) -> None:
        self._new: set[str] = set()
        self._taken: set[str] = set()
        self._common = digest(made_from)
        self._rows = Predictions(path, _Row, others)

    @property
    def taken(self) -> int:
        """Measurements that were asked for and had been made before the file was opened."""
        return len(self._taken)

    def get(self, example: Mapping[str, Any], schedule: PruningSchedule) -> Damage | None:
        """See `Measurements`."""
        key = self._key(example, schedule)
        row = self._rows.get(key)
        if row is None:
            return None
        if key not in self._new:
            self._taken.add(key)
        return Damage(**row)

    def add(self, example: Mapping[str, Any], schedule: PruningSchedule, damage: Damage) -> None:
        """See `Measurements`; it is in the file when this returns."""
        key = self._key(example, schedule)
        self._new.add(key)
        self._rows.add(key, _Row(kl=damage.kl, loss=damage.loss, kept_share=damage.kept_share))

    def _key(self, example: Mapping[str, Any], schedule: PruningSchedule) -> str:
        return digest([self._common, example["prompt_ids"], example["response_ids"], schedule.to_dict()])
