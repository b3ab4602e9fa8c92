"""Saliency on disk: shards of labels, the index that ties them to one model and one data set, and their reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sdtp.errors import UserError
from sdtp.pipeline.files import sha256_file

# The splits that have labels: those the scorer is trained on, and those that tell how well it learned.
SPLITS = ("train", "heldout")


def metadata(model: Path, data: Path, layers: Sequence[int], reduction: str, target: str) -> dict[str, Any]:
    """What labels were made of: reduction, target, layers, and the content hashes of model and data folders."""
    return {
        "reduction": reduction,
        "target": target,
        "layers": list(layers),
        "model_sha256": json.loads((model / "manifest.json").read_text(encoding="utf-8"))["sha256"],
        "data_sha256": data_hash(data),
    }


def data_hash(data: Path) -> str:
    """The content hash in a data folder's manifest."""
    return str(json.loads((data / "manifest.json").read_text(encoding="utf-8"))["content_sha256"])


def read_shard(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A shard's metadata as `metadata` gives it, and the shape of each example's labels by id; no labels are read.

    Raises:
        UserError: no such file, a damaged one, or one without the metadata.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # not a dict
        return {**found, "layers": json.loads(found["layers"])}, shapes
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a whole saliency shard ({error}): run its step again") from error


class Labels:
    """The saliency of every indexed example, read from the shards on demand.

    Args:
        index: index.json; the shards lie beside it.

    Attributes:
        description: as `metadata` gives it.

    Raises:
        UserError: a shard is missing, or its checksum is not the one in the index.
    """

    def __init__(self, index: Path) -> None:
        content = json.loads(index.read_text(encoding="utf-8"))
        self.description = {
            key: content[key] for key in ("reduction", "target", "layers", "model_sha256", "data_sha256")
        }
        self._index = index
        self._shard = {example["id"]: index.parent / example["shard"] for example in content["examples"]}
        for shard in content["shards"]:
            path = index.parent / shard["file"]
            if not path.is_file() or sha256_file(path) != shard["sha256"]:
                raise UserError(f"{path} is not the shard {index} was made of: run saliency-index again")

    def __getitem__(self, example: str) -> torch.Tensor:
        """[stages, prompt_tokens] float32 of the example with this id.

        Raises:
            UserError: the index has no such example.
        """
        if example not in self._shard:
            raise UserError(f"{self._index} has no example {example!r}: it belongs to other data")
        with safe_open(self._shard[example], framework="pt") as file:
            labels: torch.Tensor = file.get_tensor(example)
        return labels
