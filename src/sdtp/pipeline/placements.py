"""A model where a placement has it: refused where it cannot be had, else loaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from sdtp.pipeline.models import load_model
from sdtp.pipeline.placement import Placement
from sdtp.training.processes import Processes


def refusal(placement: Placement, config: PretrainedConfig, gpus: int) -> str | None:
    """Why a placement cannot be had on this machine or of this model; None where it can.

    Args:
        placement: which.
        config: of the model.
        gpus: how many this process may see; 0 for a machine that computes on the CPU.
    """
    devices = placement.devices
    if placement.kind == "split" and not gpus:
        return f"layers are split over GPUs: {devices} are needed, there is none"
    if 0 < gpus < devices:
        return f"{devices} GPUs are needed, there {'is' if gpus == 1 else 'are'} {gpus}"
    if placement.kind == "tensor":
        if not getattr(config, "base_model_tp_plan", None):
            return f"transformers has no plan for tensor parallelism of {config.model_type}"
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        if heads % devices or shared % devices:
            return f"{heads} attention heads and {shared} key-value heads cannot be shared evenly by {devices} devices"
    return None


def place(
    placement: Placement, folder: Any, dtype: str, attention: str, group: Processes
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model where it stands, and on the first process the whole of it on one device, to compare with.

    Args:
        placement: which; `refusal` has nothing against it.
        folder: the model's.
        dtype, attention: see `sdtp.pipeline.models.load_model`.
        group: the processes of the placement; each calls this.

    Returns:
        The second is the first where that is whole; None on other processes, and where it does not fit beside it.
    """
    if placement.kind in ("one", "replicas"):
        model = load_model(folder, dtype, attention, group.device)
        return model, model if group.main else None
    spread: dict[str, Any] = {"device_map": "balanced"}
    if placement.kind == "tensor":
        spread = {"distributed_config": DistributedConfig(tp_plan="auto")}
    model = load_model(folder, dtype, attention, group.device, spread)
    if not group.main:
        return model, None
    try:
        return model, load_model(folder, dtype, attention, group.device)
    except torch.OutOfMemoryError:
        return model, None
