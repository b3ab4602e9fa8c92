"""Models that one process reads and all share: `torchrun spread.py OUT_FOLDER MODEL_FOLDER...`.

`test_sharded_model.py` starts it, and calls `load`, `names` and `tensors` itself for what one process reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sdtp.evaluation.memory import peak_memory
from sdtp.pipeline.steps.train import load_for
from sdtp.training.backbone import shard
from sdtp.training.processes import Processes

CPU = torch.device("cpu")


def load(folder: Path, processes: Processes) -> PreTrainedModel:
    """The model of a folder, in bfloat16, as the train step loads it to be sharded."""
    return load_for(processes, folder, "bfloat16", "eager", sharded=processes.count > 1)


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All parameters and buffers, whole ones, under every name that they have."""
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in found.items()}


def names(model: PreTrainedModel) -> list[str]:
    """Of the parameters, one each: of tied ones the first."""
    return [name for name, _ in model.named_parameters()]


def held(model: PreTrainedModel) -> int:
    """Bytes of the parameters that this process holds, of shards the own."""
    own = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in model.parameters()]
    return sum(weight.nbytes for weight in own if not weight.is_meta)


def spread(folder: Path, processes: Processes) -> dict[str, Any]:
    """What this process holds of a model when it is loaded and when it is sharded, and the most bytes meanwhile."""
    with peak_memory(CPU) as before:
        pass
    with peak_memory(CPU) as peak:
        model = load(folder, processes)
        loaded = held(model)
        shard(model, processes)
    assert before.bytes is not None
    assert peak.bytes is not None
    found = {"loaded": loaded, "sharded": held(model), "peak": peak.bytes - before.bytes, "names": names(model)}
    return found if folder.name == "large" else {**found, "tensors": tensors(model)}


def main(out_folder: str, *folders: str) -> None:
    """Write what each model gave on this process."""
    processes = Processes(cpu=True)
    found = {Path(folder).name: spread(Path(folder), processes) for folder in folders}
    torch.save(found, Path(out_folder) / f"rank{processes.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
