"""Which model a learned pruner was trained for: its sizes and small samples of its weights.

A pruner reads hidden states, which mean something in one model only. Two models of the same sizes are told apart by
weights that users seldom touch: norms and the input embedding. These survive a cast to another dtype, quantised linear
weights, offloading, adapters of PEFT and merged low-rank updates of linear weights, all of which pass. So does a
fine-tuned model as long as nearly all the sampled values stayed within 0.8% of what they were (in SmolLM2-135M 95% of
the embedding's did over 20 steps of AdamW on all weights at 1e-5, and 86% over 60); beyond that it is another model,
and so is one with another vocabulary or with an embedding that was quantised and restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CHANNELS = 8  # first channels of every sampled vector
ROWS = 32  # of the embedding, evenly spaced

# Casts on different ways may end one step of bfloat16 apart, up to 0.8%; below 6e-5 a step of float16 is 6e-8.
_RELATIVE, _ABSOLUTE = 0.008, 1e-7
_AGREEING = 0.95  # of the norms' values, and of the embedding's: a row or two of new special tokens may differ

# Names under which adapters of PEFT keep the module they were put in place of.
_ADAPTERS_PARTS = ("base_layer", "original_module", "token_adapter")

_PLAIN_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some values of one weight.

    Attributes:
        name: the weight's name inside the causal LM, without what adapters add to it.
        shape: of the whole weight: [channels] of a norm, [vocabulary, channels] of the embedding.
        values: the first `CHANNELS` channels of the norm, or of each of `ROWS` rows of the embedding.
    """

    name: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What tells one model from another; see `fingerprint`, which takes it.

    Attributes:
        model_type: transformers' name of the architecture.
        hidden_size: width of the hidden states.
        num_layers: decoder layers.
        vocab_size: tokens in the vocabulary.
        samples: of the weights that could be read.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    samples: tuple[Sample, ...]

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, naming every difference, if `model` is another one than the fingerprint was taken from.

        Weights are compared where both models' could be read; where none could, the sizes decide alone.

        Args:
            model: a causal LM of transformers, out of its wrappers.
        """
        other = fingerprint(model)
        sizes = [field.name for field in dataclasses.fields(self) if field.name != "samples"]
        pairs = [(name, getattr(other, name), getattr(self, name)) for name in sizes]
        faults = [f"its {name} is {theirs}, not {mine}" for name, theirs, mine in pairs if theirs != mine]
        agreement = self._agreement(other)
        if not faults and agreement < _AGREEING:
            faults = [f"its weights: {agreement:.0%} of the sampled values agree, {_AGREEING:.0%} are needed"]
        if faults:
            raise ValueError(
                f"this {type(model).__name__} is another model than the pruner was trained for: {'; '.join(faults)}"
            )

    def _agreement(self, other: Fingerprint) -> float:
        """Fraction of equal values, of the norms or of the embedding, whichever is lower; 1 if none is in both."""
        theirs = {(sample.name, sample.shape): sample.values for sample in other.samples}
        fractions = []
        for ndim in (1, 2):  # apart: untrained norms are all ones, and many norms must not outvote the embedding
            common = [s for s in self.samples if len(s.shape) == ndim and (s.name, s.shape) in theirs]
            if common:
                mine = torch.tensor([value for s in common for value in s.values])
                yours = torch.tensor([value for s in common for value in theirs[s.name, s.shape]])
                close = torch.isclose(mine, yours, rtol=_RELATIVE, atol=_ABSOLUTE)
                fractions.append(close.double().mean().item())
        return min(fractions, default=1.0)


@torch.no_grad()
def fingerprint(model: nn.Module) -> Fingerprint:
    """Take a model's fingerprint.

    Left out are weights that cannot be read here: quantised ones, shards of tensor parallelism, and weights on the meta
    device that no hook of accelerate holds.

    Args:
        model: a causal LM of transformers, out of its wrappers.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    names, shapes, picked = [], [], []
    for name, shape, weight in _weights(model):
        if len(shape) == 2:
            rows = torch.tensor([(shape[0] - 1) * row // (ROWS - 1) for row in range(ROWS)], device=weight.device)
            weight = weight[:, :CHANNELS].index_select(0, rows)
        names.append(name)
        shapes.append(shape)
        picked.append(weight[..., :CHANNELS].reshape(-1).float())
    samples = map(Sample, names, shapes, _read(picked))
    return Fingerprint(
        config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size, tuple(samples)
    )


def _read(pieces: list[torch.Tensor]) -> list[tuple[float, ...]]:
    """The values of small float32 vectors, to six digits, with one copy from each device."""
    values: list[tuple[float, ...]] = [()] * len(pieces)
    for device in {piece.device for piece in pieces}:
        here = [index for index, piece in enumerate(pieces) if piece.device == device]
        flat = torch.cat([pieces[index] for index in here]).tolist()
        for index in here:
            length = pieces[index].numel()
            values[index] = tuple(float(f"{value:.6g}") for value in flat[:length])
            flat = flat[length:]
    return values


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Name, shape and tensor of every norm's weight and of the input embedding, where they can be read."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    while hasattr(embedding, "base_layer") or hasattr(embedding, "original_module"):
        embedding = getattr(embedding, "base_layer", None) or embedding.original_module
    seen = set()
    for path, module in model.named_modules():
        parameter = module._parameters.get("weight")
        if parameter is None or parameter.ndim != (2 if module is embedding else 1):
            continue
        name = ".".join(part for part in [*path.split("."), "weight"] if part not in _ADAPTERS_PARTS)
        weight = _readable(model, f"{path}.weight", parameter)
        if weight is not None and name not in seen:
            seen.add(name)
            yield name, tuple(parameter.shape), weight


def _readable(model: nn.Module, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
    """A parameter as a plain floating-point tensor that holds values; None if there is none here."""
    tensor: Any = parameter.data
    if hasattr(tensor, "placements"):  # a DTensor
        tensor = tensor.to_local() if all(placement.is_replicate() for placement in tensor.placements) else None
    elif tensor.is_meta:
        tensor = _offloaded(model, name)
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.dtype in _PLAIN_FLOATS
    return tensor.detach() if plain and tensor.shape == parameter.shape else None


def _offloaded(model: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter that a hook of accelerate holds for its module or for one around it."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            held = getattr(one, "weights_map", None)
            if held is not None:
                with contextlib.suppress(KeyError):  # asking whether it holds the weight would read it twice
                    tensor: torch.Tensor = held[".".join(parts[depth:])]
                    return tensor
    return None
