"""Names of placements, what they share out, and why one cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, LlamaConfig

from sdtp.errors import UserError
from sdtp.pipeline.placement import Placement
from sdtp.pipeline.placements import refusal

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NINE = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("name", "placement", "processes"),
    [
        ("one", Placement("one", 1), 1),
        ("split-2", Placement("split", 2), 1),
        ("tensor-4", Placement("tensor", 4), 4),
        ("replicas-64", Placement("replicas", 64), 64),
    ],
)
def test_names(name: str, placement: Placement, processes: int) -> None:
    assert Placement.parse(name) == placement
    assert placement.processes == processes


@pytest.mark.parametrize(
    "name", ["", "two", "one-2", "split", "split-1", "tensor-02", "replicas-65", "split-2x", "ONE"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^serving.placements: '{name}' is not known; accepted: one, split-K"):
        Placement.parse(name)


def test_replicas_share_batches_out_and_others_all_have_them_all() -> None:
    batches = list(range(6))
    assert [Placement("replicas", 3).share(batches, rank) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [Placement("tensor", 3).share(batches, rank) for rank in range(3)] == [batches] * 3


@pytest.mark.parametrize(
    ("name", "heads", "gpus", "told"),
    [
        ("one", HEADS, 0, None),
        ("one", HEADS, 1, None),
        ("replicas-2", HEADS, 0, None),
        ("replicas-2", HEADS, 2, None),
        ("replicas-2", HEADS, 1, "2 GPUs are needed, there is 1"),
        ("tensor-2", HEADS, 0, None),
        ("tensor-4", HEADS, 2, "4 GPUs are needed, there are 2"),
        ("tensor-4", HEADS, 0, "4 attention heads and 2 key-value heads cannot be shared evenly by 4 devices"),
        ("tensor-2", NINE, 0, "9 attention heads and 3 key-value heads cannot be shared evenly by 2 devices"),
        ("split-2", HEADS, 0, "layers are split over GPUs: 2 are needed, there is none"),
        ("split-2", HEADS, 2, None),
    ],
)  # fmt: skip
def test_what_cannot_be_had_says_why(name: str, heads: dict[str, Any], gpus: int, told: str | None) -> None:
    assert refusal(Placement.parse(name), LlamaConfig(**heads), gpus) == told


def test_a_model_without_a_plan_has_no_tensor_parallelism() -> None:
    told = refusal(Placement("tensor", 2), BloomConfig(), 2)
    assert told == "transformers has no plan for tensor parallelism of bloom"
