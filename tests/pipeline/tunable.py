"""Folders of a run whose pruner can be tuned, with a model of which it is known where pruning hurts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule


def made(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Six layers, of which the last three attend to nothing: what is removed before layer 3 is never missed."""
    model = tiny_model(num_hidden_layers=6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight.mul_(0.0 if int(name.split(".")[2]) >= 3 else 20.0)
    return model


def save(folder: Path, model: PreTrainedModel, schedule: PruningSchedule) -> Path:
    """Folders `model`, `pruner` and `data` of 8 retrievals and 4 continuations, and one example too short."""
    model.save_pretrained(folder / "model")
    manifest = {"trust_remote_code": False, "context_length": 512, "weights_sha256": "w" * 64}
    (folder / "model" / "manifest.json").write_text(json.dumps(manifest))
    save_pruner(folder, schedule, seed=0)
    generator = torch.Generator().manual_seed(0)
    lengths = [30, 40, 50, 60, 44, 41, 40, 39, 5, 48, 49, 50, 51]
    rows = [
        {
            "id": f"e{number}",
            "task": "retrieval" if number < 8 else "continuation",
            "prompt_ids": torch.randint(3, 128, (length,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 128, (12,), generator=generator).tolist(),
        }
        for number, length in enumerate(lengths)
    ]
    whole = Dataset.from_list(rows)
    whole.save_to_disk(folder / "data" / "heldout")
    whole.select([0]).save_to_disk(folder / "data" / "test")
    whole.select([8, 8]).save_to_disk(folder / "data" / "train")
    splits = {split: {"content_sha256": split[0] * 64} for split in ("heldout", "test", "train")}
    (folder / "data" / "manifest.json").write_text(json.dumps({"splits": splits}))
    return folder


def save_pruner(folder: Path, schedule: PruningSchedule, seed: int) -> None:
    """Folder `pruner`, of a scorer with weights of its own for each seed."""
    torch.manual_seed(seed)
    TokenPruner(schedule, scorers.Learned(32, schedule.stages, width=4)).save_pretrained(folder / "pruner")
