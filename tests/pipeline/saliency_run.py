"""A run folder with a tiny model and random examples, and the saliency steps on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from sdtp.pipeline.steps import saliency, saliency_index

MODEL = {"dtype": "float32", "attention": "sdpa"}
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "pruning": {"start": 1, "step": 2},
    "saliency": {"reduction": "signed", "target": "loss", "batch_tokens": 50, "gradient_checkpointing": False},
}
CODE = "c" * 64


def make_run(folder: Path, model: PreTrainedModel, prompt_tokens: Sequence[int]) -> None:
    """Examples e0, e1, ... of these lengths, three response tokens each; the last one is held out."""
    model.save_pretrained(folder / "model")
    (folder / "model" / "manifest.json").write_text(json.dumps({"sha256": "m" * 64, "trust_remote_code": False}))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "id": f"e{number}",
            "prompt_ids": torch.randint(3, 128, (tokens,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 128, (3,), generator=generator).tolist(),
        }
        for number, tokens in enumerate(prompt_tokens)
    ]
    Dataset.from_list(rows[:-1]).save_to_disk(folder / "data" / "train")
    Dataset.from_list(rows[-1:]).save_to_disk(folder / "data" / "heldout")
    splits = {split: {"content_sha256": "e" * 64} for split in ("train", "heldout")}
    manifest = {"content_sha256": "d" * 64, "splits": splits}
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))


def inputs(run: Path) -> list[str]:
    return ["--model", str(run / "model"), "--data", str(run / "data")]


def output(run: Path, index: int) -> Path:
    return run / "saliency" / f"shard-{index}.safetensors"


def checkpoints(run: Path, index: int) -> Path:
    return run / "checkpoints" / "saliency" / str(index)


def chunks(run: Path, index: int) -> list[Path]:
    """The chunks of a shard that was killed, in their order, of one fingerprint or several."""
    return sorted(path for path in checkpoints(run, index).rglob("*") if path.is_file())


def shard_arguments(
    run: Path, index: int, count: int = 2, settings: dict[str, Any] = SETTINGS, code: str = CODE
) -> list[str]:
    files = ["--output", str(output(run, index)), "--metrics", str(run / "metrics" / f"s{index}.json")]
    files += ["--checkpoints", str(checkpoints(run, index)), "--code", code]
    return ["--settings", json.dumps(settings), *inputs(run), "--shard", str(index), "--shards", str(count), *files]


def shard(run: Path, index: int, count: int = 2, settings: dict[str, Any] = SETTINGS, code: str = CODE) -> Path:
    """Runs the saliency step; the shard it writes."""
    saliency.main(shard_arguments(run, index, count, settings, code))
    return output(run, index)


def index_of(run: Path, shards: Sequence[Path]) -> Path:
    """Runs the saliency-index step; the index it writes."""
    written = run / "saliency" / "index.json"
    arguments = ["--settings", "{}", "--data", str(run / "data"), "--shards", *map(str, shards)]
    saliency_index.main([*arguments, "--output", str(written), "--metrics", str(run / "metrics" / "index.json")])
    return written
