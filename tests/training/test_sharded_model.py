"""A sharded model is read once, by the main process, and no other ever holds all of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sdtp.training.processes import Processes
from tests.conftest import FAMILIES, TINY
from tests.training import spread
from tests.training.test_several_processes import REPOSITORY, launch

# Tied embeddings; two rotary tables and a scale that no file holds; and ALiBi, with no rotary table at all.
SHARED = ("llama", "gemma3", "bloom")


def make_model(family: str) -> PreTrainedModel:
    """A tiny model with random weights."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(1234)
    return model_class(config_class(**{**TINY, **extra}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models; of `large` the weights are most of what a process that holds them holds."""
    made = tmp_path_factory.mktemp("models")
    large = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=128
    )
    models = {family: make_model(family) for family in SHARED} | {"large": LlamaForCausalLM(large).bfloat16()}
    for name, model in models.items():
        model.save_pretrained(made / name)
        (made / name / "manifest.json").write_text(json.dumps({"trust_remote_code": False}))
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """By rank and model what two processes found."""
    program = os.path.join(REPOSITORY, "tests", "training", "spread.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system at once
        done = launch(program, folder, *[folder / name for name in (*SHARED, "large")])
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("family", SHARED)
def test_every_process_ends_with_the_main_ones_weights(folder: Path, ranks: list[dict[str, Any]], family: str) -> None:
    model = spread.load(folder / family, Processes(cpu=True))
    expected = spread.tensors(model)
    assert any("inv_freq" in name for name in expected) == (family != "bloom")
    for rank in ranks:
        assert rank[family]["tensors"].keys() == expected.keys()
        assert rank[family]["names"] == spread.names(model)
        for name, value in expected.items():
            assert rank[family]["tensors"][name].dtype == value.dtype, name
            assert torch.equal(rank[family]["tensors"][name], value), name


@pytest.mark.slow
def test_the_main_process_alone_reads_the_weights_and_each_keeps_its_share(ranks: list[dict[str, Any]]) -> None:
    main, other = (rank["large"] for rank in ranks)
    assert main["loaded"] > 2.4e8
    assert other["loaded"] == 0
    assert main["sharded"] == other["sharded"]
    assert 0.5 < other["sharded"] / main["loaded"] < 0.51  # half of the layers, and the embeddings


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_the_memory_of_the_other_processes_is_their_shards_and_a_layer(ranks: list[dict[str, Any]]) -> None:
    main, other = (rank["large"] for rank in ranks)
    assert main["peak"] > main["loaded"]
    assert other["sharded"] < other["peak"] < other["sharded"] + 2 * main["loaded"] / 12
