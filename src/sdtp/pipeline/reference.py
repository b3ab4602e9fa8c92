"""The unpruned model's last hidden states on the test examples, on disk: what agreement with it is measured against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdtp.errors import UserError
from sdtp.pipeline.files import canonical_json, digest, write_atomically
from sdtp.pipeline.reading import read_json, reading

# The key of the file's metadata.
_DESCRIPTION = "description"


def example_hash(example: Mapping[str, Any]) -> str:
    """SHA-256 of an example's token ids: whether states are of this very prompt and response."""
    return digest([list(example["prompt_ids"]), list(example["response_ids"])])


def write_reference(
    path: Path, states: Mapping[str, torch.Tensor], examples: Sequence[Mapping[str, Any]], model: Path
) -> None:
    """Write the states by example id, atomically, with what they were made of.

    Args:
        path: a safetensors file.
        states: [response, hidden] each, of one dtype: what enters the head to predict the response's tokens.
        examples: the rows of the test split that they are of.
        model: the model's folder.
    """
    description = {
        "model_sha256": _model_hash(model),
        "dtype": _name(next(iter(states.values())).dtype),
        "examples": {example["id"]: example_hash(example) for example in examples},
        "states_sha256": _digest((name, states[name]) for name in sorted(states)),
    }
    with write_atomically(path) as temporary:
        # One key: safetensors writes several in an order that differs from process to process.
        save_file(dict(states), temporary, {_DESCRIPTION: canonical_json(description)})


class Reference:
    """The states of each example, read when they are asked for.

    Args:
        path: made by `write_reference`.
        model: the folder of the model that is evaluated.
        dtype: its weights'.

    Raises:
        UserError: no such file, a damaged one, or one of another model or dtype.
    """

    def __init__(self, path: Path, model: Path, dtype: torch.dtype) -> None:
        with reading(path, "the file of states that the reference step makes is needed"):
            self._file: Any = safe_open(path, framework="pt")
            description = json.loads((self._file.metadata() or {})[_DESCRIPTION])
            made_of, made_in = description["model_sha256"], description["dtype"]
            self._examples = dict(description["examples"])
            names = sorted(self._file.keys())
            found = _digest((name, self._file.get_tensor(name)) for name in names)
            whole = found == description["states_sha256"]
        if not whole:
            raise UserError(f"{path} does not match its checksum: run the reference step again")
        if made_of != _model_hash(model):
            raise UserError(f"{path} is of another model than {model}: run the reference step again")
        if made_in != _name(dtype):
            raise UserError(
                f"{path} holds {made_in} states and the model runs in {_name(dtype)}: run the reference step again"
            )
        self._path = path

    def __call__(self, example: Mapping[str, Any]) -> torch.Tensor:
        """States [response, hidden] of an example of the test split, on the CPU.

        Raises:
            UserError: there are none, or they are of another prompt or response.
        """
        known = self._examples.get(example["id"])
        if known != example_hash(example):
            other = "no example" if known is None else "other tokens for example"
            raise UserError(f"{self._path} has {other} {example['id']!r}: run the reference step again on this data")
        states: torch.Tensor = self._file.get_tensor(example["id"])
        return states


def _digest(states: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over (id, states) pairs in order."""
    found = hashlib.sha256()
    for name, tensor in states:
        found.update(canonical_json([name, _name(tensor.dtype), list(tensor.shape)]).encode())
        # As bytes: numpy has no bfloat16.
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model_hash(model: Path) -> str:
    """The content hash in a model folder's manifest."""
    return str(read_json(model / "manifest.json")["sha256"])
