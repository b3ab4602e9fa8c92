"""Saliency on disk: shards of labels, the index that ties them to one model and one data set, and their reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdtp.errors import UserError
from sdtp.pipeline.files import canonical_json, sha256_file, write_atomically
from sdtp.pipeline.reading import inside, read_json

# The key of a file's metadata, and the one in it that holds the checksum of all else in the file.
_DESCRIPTION, _DIGEST = "description", "labels_sha256"


def metadata(model: Path, data: Path, layers: Sequence[int], reduction: str, target: str) -> dict[str, Any]:
    """What labels were made of: reduction, target, layers, and the content hashes of model and data folders."""
    return {
        "reduction": reduction,
        "target": target,
        "layers": list(layers),
        "model_sha256": read_json(model / "manifest.json")["sha256"],
        "data_sha256": data_hash(data),
    }


def data_hash(data: Path) -> str:
    """The content hash in a data folder's manifest."""
    return str(read_json(data / "manifest.json")["content_sha256"])


def write_labels(path: Path, labels: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write labels by example id, atomically, with a checksum over them and their description.

    The same labels and description are the same bytes. Labels that are views of mapped files (`map_labels`) go from
    file to file: they need not fit into memory.

    Args:
        path: a safetensors file.
        labels: [stages, prompt_tokens] float32 each.
        description: what made them, JSON values.
    """
    digest = _digest(description, ((name, labels[name]) for name in sorted(labels)))
    with write_atomically(path) as temporary:
        # One key: safetensors writes several in an order that differs from process to process.
        save_file(dict(labels), temporary, {_DESCRIPTION: canonical_json({**description, _DIGEST: digest})})


def map_labels(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and labels that `write_labels` wrote, checked against their checksum.

    The labels are views of the mapped file: they are read from the disk when they are used.

    Raises:
        UserError: no such file, a damaged one, or one without the description.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description: dict[str, Any] = json.loads((file.metadata() or {})[_DESCRIPTION])
            expected = description.pop(_DIGEST)
            labels = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a whole file of labels ({error}): run the saliency step again") from error
    if _digest(description, labels.items()) != expected:
        raise UserError(f"{path} does not match its checksum: run the saliency step again")
    return description, labels


def _digest(description: Mapping[str, Any], labels: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over a description and (id, labels) pairs in order: what a file says, whatever its layout."""
    digest = hashlib.sha256(canonical_json(dict(description)).encode())
    for name, label in labels:
        digest.update(canonical_json([name, str(label.dtype), list(label.shape)]).encode())
        digest.update(label.contiguous().numpy().data)
    return digest.hexdigest()


def write_shard(
    path: Path, labels: Mapping[str, torch.Tensor], made_of: Mapping[str, Any], shard: int, shards: int
) -> None:
    """Write one shard, see `write_labels`.

    Args:
        path: the file.
        labels: by example id.
        made_of: as `metadata` gives it.
        shard, shards: its number, from 0, and how many there are.
    """
    write_labels(path, labels, {**made_of, "shard": shard, "shards": shards})


def read_shard(path: Path) -> tuple[dict[str, Any], tuple[int, int], dict[str, tuple[int, ...]]]:
    """What is in a shard, after every label was checked against the checksum.

    Returns:
        What it was made of, as `metadata` gives it; its number, from 0, and how many shards there are; and the shape of
        each example's labels by id.

    Raises:
        UserError: no such file, a damaged one, or one that is no shard.
    """
    made_of, labels = map_labels(path)
    if not made_of.keys() >= {"shard", "shards", "layers"}:
        raise UserError(f"{path} is not a saliency shard: its description has {', '.join(sorted(made_of))} only")
    place = made_of.pop("shard"), made_of.pop("shards")
    return made_of, place, {name: tuple(label.shape) for name, label in labels.items()}


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
        content = read_json(index)
        self.description = {
            key: content[key] for key in ("reduction", "target", "layers", "model_sha256", "data_sha256")
        }
        self._index = index
        self._shard = {example["id"]: inside(index.parent, example["shard"], index) for example in content["examples"]}
        for shard in content["shards"]:
            path = inside(index.parent, shard["file"], index)
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
