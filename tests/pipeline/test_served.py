"""The model that MLflow serves: many requests at once, and the number format it runs in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sdtp.pipeline.packaging import save_model
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

REQUESTS = 4


@pytest.fixture
def served(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., Any]:
    """Packs a tiny model of a dtype with a pruner, and loads what MLflow would serve."""

    def serve(saved: torch.dtype, dtype: str) -> Any:
        model = tiny_model(dtype=saved)
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path / "model")
        backend = Tokenizer(models.WordLevel({f"w{index:03}": index for index in range(128)}, unk_token="w003"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w003", pad_token="w000")
        tokenizer.save_pretrained(tmp_path / "model")
        schedule = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
        TokenPruner(schedule, scorers.Random(seed=0)).save_pretrained(tmp_path / "pruner")
        named = {"revision": None, "attention": "sdpa", "trust_remote_code": False}
        save_model(
            tmp_path / "served", tmp_path / "pruner", {"model": str(tmp_path / "model"), "dtype": dtype, **named}
        )
        return mlflow.pyfunc.load_model(str(tmp_path / "served"))

    return serve


def test_requests_at_once_are_answered_as_they_are_alone(served: Callable[..., Any]) -> None:
    model = served(torch.float32, "float32")
    prompts = [" ".join(f"w{4 + (7 * row + index) % 120:03}" for index in range(40)) for row in range(REQUESTS)]
    together = threading.Barrier(REQUESTS)

    def ask(prompt: str) -> pd.DataFrame:
        together.wait()
        return model.predict(pd.DataFrame({"prompt": [prompt]}), params={"max_new_tokens": 20})

    with ThreadPoolExecutor(REQUESTS) as pool:  # the first of them read the language model
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.predict(pd.DataFrame({"prompt": [prompt]}), params={"max_new_tokens": 20})
        pd.testing.assert_frame_equal(answer, alone)
        assert answer["prompt_tokens"].tolist() == [40]
        assert answer["kept_tokens"].tolist() == [12]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_number_format_is_the_run_s_and_not_the_checkpoint_s(served: Callable[..., Any], dtype: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("auto is another format on a GPU")
    model = served(torch.bfloat16, dtype)
    model.predict(pd.DataFrame({"prompt": ["w005 w006"]}), params={"max_new_tokens": 1})
    language_model, _ = model.unwrap_python_model()._loaded
    assert language_model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
