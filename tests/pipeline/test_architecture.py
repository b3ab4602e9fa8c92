"""Which models are supported, told from their configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from sdtp.errors import UserError
from sdtp.pipeline.architecture import check_architecture

# A Llama of 7 billion parameters: on the meta device it costs nothing.
SUPPORTED = [
    LlamaConfig(), Qwen2Config(), Qwen3Config(), MistralConfig(), Gemma3TextConfig(), OPTConfig(), BloomConfig(),
]  # fmt: skip


@pytest.mark.parametrize("config", SUPPORTED, ids=lambda config: config.model_type)
def test_supported_model_is_accepted_without_weights(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    check_architecture(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "GPT2LMHeadModel is not supported: its decoder gives .*; supported are decoders with full"),
        (T5Config(), r"is no causal language model: .*T5Config.*; supported are decoders with full"),
        (DeepseekV3Config(), "DeepseekV3Config"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unsupported_model_is_refused_in_one_line(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model\.source: .*{reason}") as refused:
        check_architecture(tmp_path, trust_remote_code=False)
    assert len(str(refused.value).splitlines()) == 1


def test_model_type_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(UserError, match=r"^model\.source: .*unheard-of"):
        check_architecture(tmp_path, trust_remote_code=False)
