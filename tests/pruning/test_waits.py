"""Calls in a pruned prefill that would make the host wait for a GPU, counted without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

Tensor = torch.Tensor
READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
READS |= {Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal, Tensor.masked_select}


class Waits(TorchFunctionMode):
    """Counts reads of tensors by the host, indexing with a mask, and numbers copied to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        masks = args[1] if func is Tensor.__getitem__ and isinstance(args[1], tuple) else args[1:2]
        masked = func is Tensor.__getitem__ and any(getattr(m, "dtype", None) == torch.bool for m in masks)
        # A tensor of host numbers made on a device waits for it; one made on the host does not, nor an empty one.
        copied = func is torch.tensor and (kwargs or {}).get("device") is not None and result.numel()
        if func in READS or masked or copied:
            self.found.append(func.__name__)
        return result


@pytest.mark.parametrize(("padded", "allowed"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("stages", [1, 3])
def test_prefill_waits_as_often_whatever_the_stages(
    tiny_model: Callable[..., PreTrainedModel], padded: bool, allowed: int, stages: int
) -> None:
    model = tiny_model()
    keep = (0.7, 0.5, 0.3)[:stages]
    pruner = TokenPruner(PruningSchedule((1, 2, 3)[:stages], keep), scorers.Learned(32, stages))
    prompt = torch.randint(128, (2, 80))
    mask = torch.ones_like(prompt)
    mask[0, :20] = 0
    inputs = {"input_ids": prompt, "attention_mask": mask} if padded else {"input_ids": prompt[:1]}
    with torch.inference_mode():
        with Waits() as unpruned:
            model(**inputs, use_cache=True, logits_to_keep=1)
        with pruner(model), Waits() as pruned:
            model(**inputs, use_cache=True, logits_to_keep=1)
    assert len(pruned.found) - len(unpruned.found) <= allowed, pruned.found
