"""A KV cache on disk: one safetensors file with what its layers know as JSON in the header; nothing is unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from sdtp.disk import sync, temporary_sibling
from sdtp.pruning.adapter import Architecture, architecture, tensor_parallel_group
from sdtp.pruning.cache import PrunedLayer, check_cache, know_later
from sdtp.pruning.fingerprint import Fingerprint, fingerprint
from sdtp.pruning.plain import from_plain
from sdtp.pruning.wrappers import unwrap

_HEADER = "sdtp_kv_cache"  # the key of the JSON among the file's metadata
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer, besides its keys and values.

    Attributes:
        stage: the stage whose survivors it holds, see `PrunedLayer`; None in a cache without removed tokens.
        tokens: slots filled, those that left a window included.
        window: of a sliding layer; None of one that keeps everything.
        records: whether a sliding layer holds on to what leaves its window.
    """

    stage: int | None
    tokens: int
    window: int | None
    records: bool


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What the layers of one stage have in common, see `PrunedLayer`."""

    stage: int
    prompt_slots: int
    padded: bool


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What the header says.

    Attributes:
        format: of this file.
        checksum: CRC-32 of the tensors' bytes, in order of their names.
        seen: columns of input up to here, removed tokens and padding included; None in a cache without removed tokens.
        stages: what layers know of removed tokens.
        layers: one a decoder layer.
        model: the model that made the cache.
    """

    format: int
    checksum: int
    seen: int | None
    stages: tuple[_Stage, ...]
    layers: tuple[_Layer, ...]
    model: Fingerprint


def save_cache(cache: Cache, path: str | Path, model: nn.Module) -> None:
    """Write a KV cache, pruned or not, so that `load_cache` gives one that goes on exactly as this one.

    A crash leaves the old file or the new one, whole.

    Args:
        cache: of dynamic and sliding layers; an offloaded one is read back as one that is not.
        path: of the file, by convention `*.safetensors`.
        model: the causal LM that filled the cache, also inside a wrapper.

    Raises:
        TypeError: the cache has layers of another kind.
        ValueError: it is empty, or quantised, or split over processes, or of another number format than the model.
        RuntimeError: a forward pass on it was interrupted.
    """
    path, inner = Path(path), unwrap(model)
    check_cache(cache, len(getattr(cache, "layers", ())))
    if len(cache.layers) != len(architecture(inner).layers):
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model {len(architecture(inner).layers)}")
    if tensor_parallel_group(inner) is not None:
        raise ValueError("a cache of tensor parallelism is not saved: each process holds some of the heads")
    tensors: dict[str, torch.Tensor] = {}
    layers, stages = [], {}
    seen = None
    for index, layer in enumerate(cache.layers):
        held: Any = layer.held if isinstance(layer, PrunedLayer) else layer
        if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"layer {index} is a {type(held).__name__}: dynamic and sliding layers are saved")
        if held.get_seq_length() == 0:
            raise ValueError(f"layer {index} holds no tokens: there is nothing to save")
        if held.keys.dtype != inner.dtype:
            raise ValueError(
                f"layer {index} is of {held.keys.dtype}, the model of {inner.dtype}: what autocast made is not saved"
            )
        tensors[f"keys.{index}"], tensors[f"values.{index}"] = held.keys, held.values
        stage = None
        if isinstance(layer, PrunedLayer):
            stage, seen = layer.stage, layer.seen
            if stage not in stages:
                stages[stage] = _Stage(stage, layer.prompt_slots, layer.padded)
                # Copies: in a prompt without padding the two are one tensor, and a file holds each by itself.
                tensors[f"positions.{stage}"] = layer.positions.clone()
                tensors[f"columns.{stage}"] = layer.columns.clone()
        window = held.sliding_window if isinstance(held, DynamicSlidingWindowLayer) else None
        layers.append(_Layer(stage, held.get_seq_length(), window, getattr(held, "record_past", False)))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    known = tuple(stages.values())
    contents = _Contents(_FORMAT, _checksum(tensors), seen, known, tuple(layers), fingerprint(inner))
    with _replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {_HEADER: json.dumps(dataclasses.asdict(contents))})


def load_cache(path: str | Path, model: nn.Module) -> DynamicCache:
    """Read what `save_cache` wrote, onto the devices of the model's layers.

    Args:
        path: of the file.
        model: the causal LM that will continue the cache: the one that made it, also inside a wrapper.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no KV cache of `save_cache`, or another model's; named with the fault.
    """
    path, inner = Path(path), unwrap(model)
    parts = architecture(inner)
    with _named(path), safe_open(path, framework="pt") as file:
        contents = _parse((file.metadata() or {}).get(_HEADER))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_tensors(contents, tensors)
        _check_model(contents, tensors, inner, parts)
    stages = {stage.stage: stage for stage in contents.stages}
    moved: dict[tuple[str, torch.device], torch.Tensor] = {}  # layers of one stage share its positions

    def at(name: str, device: torch.device) -> torch.Tensor:
        return moved.setdefault((name, device), tensors[name].to(device))

    layers: list[Any] = []
    for index, (layer, module) in enumerate(zip(contents.layers, parts.layers, strict=True)):
        device = _device(module)
        held = _filled(layer, at(f"keys.{index}", device), at(f"values.{index}", device))
        if layer.stage is None or contents.seen is None:
            layers.append(held)
            continue
        stage = stages[layer.stage]
        positions, columns = (at(f"{part}.{stage.stage}", device) for part in ("positions", "columns"))
        layers.append(
            PrunedLayer(
                held,
                positions,
                columns,
                stage.stage,
                stage.prompt_slots,
                stage.padded,
                contents.seen,
                parts.window,
                parts.maskless,
            )
        )
    if contents.seen is not None:
        know_later(layers)
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None  # none is left to be made
    return cache


def _filled(layer: _Layer, keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    held = DynamicLayer() if layer.window is None else DynamicSlidingWindowLayer(layer.window)
    held.lazy_initialization(keys, values)
    held.keys, held.values = keys, values
    if isinstance(held, DynamicSlidingWindowLayer):
        held.cumulative_length, held.record_past = layer.tokens, layer.records
    return held


def _parse(text: str | None) -> _Contents:
    if text is None:
        raise ValueError("it is no KV cache that save_cache wrote")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    if type(values) is not dict or values.get("format") != _FORMAT:
        found = values.get("format") if type(values) is dict else values
        raise ValueError(f"its header has format {found!r}: {_FORMAT} is accepted")
    return from_plain(_Contents, values, "header")


def _check_tensors(contents: _Contents, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the tensors are whole and as the header says."""
    stages = {stage.stage: stage for stage in contents.stages}
    used = {layer.stage for layer in contents.layers}
    described: set[int | None] = set(stages) if stages else {None}
    if used != described or (contents.seen is None) != (not stages):
        raise ValueError(f"its layers are of stages {sorted(map(str, used))}, and it describes {sorted(stages)}")
    names = {f"{part}.{index}" for index in range(len(contents.layers)) for part in ("keys", "values")}
    names |= {f"{part}.{stage}" for stage in stages for part in ("positions", "columns")}
    if tensors.keys() != names:
        raise ValueError(f"it has tensors {sorted(tensors.keys() ^ names)} too many or too few")
    if _checksum(tensors) != contents.checksum:
        raise ValueError("its tensors are not those that were written")
    for index, layer in enumerate(contents.layers):
        keys, values = tensors[f"keys.{index}"], tensors[f"values.{index}"]
        least = layer.tokens if layer.window is None else min(layer.tokens, layer.window - 1)
        fits = keys.ndim == 4 and keys.shape[:3] == values.shape[:3] and least <= keys.shape[2] <= layer.tokens
        if layer.stage is not None:
            slots = (keys.shape[0], layer.tokens)
            for part in ("positions", "columns"):
                tensor = tensors[f"{part}.{layer.stage}"]
                fits = fits and tensor.dtype == torch.int64 and tuple(tensor.shape) == slots
            fits = fits and 0 < stages[layer.stage].prompt_slots <= layer.tokens
        if not fits:
            raise ValueError(f"tensors of layer {index} do not fit the {layer.tokens} tokens it is said to hold")


def _check_model(contents: _Contents, tensors: dict[str, torch.Tensor], model: nn.Module, parts: Architecture) -> None:
    """Raise ValueError if another model made the cache."""
    try:
        contents.model.check(model)
    except ValueError as error:
        raise ValueError(f"another model made it: {str(error).partition(': ')[2]}") from error
    if len(contents.layers) != len(parts.layers):
        raise ValueError(f"it has {len(contents.layers)} layers, the model {len(parts.layers)}")
    for index, (layer, window) in enumerate(zip(contents.layers, parts.windows, strict=True)):
        if layer.window not in (None, window):
            raise ValueError(f"layer {index} has a window of {layer.window}, of {window} in the model")
        dtype: Any = model.dtype
        if tensors[f"keys.{index}"].dtype != dtype:
            raise ValueError(f"it is of {tensors[f'keys.{index}'].dtype}, the model of {dtype}")


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        content: Any = tensors[name].view(torch.uint8).numpy()
        crc = zlib.crc32(content, zlib.crc32(name.encode(), crc))
    return crc


def _device(layer: nn.Module) -> torch.device:
    """Where a decoder layer runs: where hooks of accelerate bring its weights, or where they are."""
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(layer.parameters()).device


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what may go wrong with the contents of a file into a ValueError that names it."""
    try:
        with open(path, "rb"):  # names what is wrong with the path, as safetensors does not
            pass
        yield
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: a file is needed") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file's path beside `path`, moved there at the end as a whole; removed where writing it failed."""
    temporary = temporary_sibling(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
