"""A causal language model and its tokenizer, loaded from the folder that `model_sources` made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp.errors import UserError
from sdtp.pipeline.files import sha256_files
from sdtp.pipeline.prompts import render
from sdtp.pipeline.reading import read_json, reading

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = ("sdpa", "eager", "flash_attention_2")
# What transformers loads; some repositories hold the same weights once more under other names.
WEIGHTS = "model*.safetensors"
WHOLE_MODEL = "the whole weights of the model that config.json describes are needed, as safetensors"


def load_model(
    folder: str | Path, dtype: str, attention: str, device: torch.device, spread: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model of `folder` for inference: eval mode, every weight frozen, from safetensors only.

    Args:
        folder: made by `fetch_model`; its own Python code runs only if it was fetched with `trust_remote_code`.
        dtype: of the weights: `auto`, `float32`, `bfloat16` or `float16` (see `choose_dtype`).
        attention: `sdpa`, `eager` or `flash_attention_2`.
        device: where the weights go.
        spread: how they go to several devices instead: options of from_pretrained, `device_map` for example.

    Raises:
        UserError: `folder` is not a model folder, or a damaged one, or `dtype` or `attention` is not one of these.
    """
    if attention not in ATTENTION:
        raise UserError(f"model.attention: {attention!r} is not known; accepted: {', '.join(ATTENTION)}")
    number_format, trusted = choose_dtype(dtype, device), _trusted(folder)
    with reading(weights_of(folder), WHOLE_MODEL):
        model, report = load_reported(
            folder,
            dtype=number_format,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trusted,
            **(spread or {}),
        )
    check_loaded(folder, report)
    loaded: PreTrainedModel = (model if spread else model.to(device)).eval().requires_grad_(False)
    return loaded


def load_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises UserError where `folder` is not one."""
    from transformers import AutoConfig

    trusted = _trusted(folder)
    with reading(Path(folder, "config.json"), "the configuration of a model is needed"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trusted
        )
    return config


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format called `name`; "auto" is bfloat16 on CUDA and float32 elsewhere.

    Raises UserError for any name but auto, float32, bfloat16 and float16.
    """
    import torch

    dtypes = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise UserError(f"model.dtype: {name!r} is not a number format; accepted: {', '.join(dtypes)}")
    return dtypes[name]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError where `folder` is not one."""
    from transformers import AutoTokenizer

    trusted = _trusted(folder)
    with reading(f"tokenizer of {folder}", "whole tokenizer files, as save_pretrained writes them, are needed"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trusted
        )
    return tokenizer


def check_template(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Raise UserError where the tokenizer of `folder` has a chat template that takes no user's message."""
    if tokenizer.chat_template is not None:
        with reading(f"chat template of {folder}", "a template that takes a lone user message is needed"):
            render(tokenizer, "a")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `fetch_model` wrote about the model of `folder`. Raises UserError where `folder` is not one it made."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no manifest.json; a model folder made by `sdtp model` is needed")
    return read_json(path)


def _trusted(folder: str | Path) -> bool:
    """Whether the user asked for the model's own code when the folder was made."""
    return bool(read_manifest(folder)["trust_remote_code"])


def weights_sha256(folder: str | Path) -> str:
    """One digest over a folder's weights: of the lines "<sha256>  <name>" of its model*.safetensors, by name.

    `cd FOLDER && LC_ALL=C sha256sum model*.safetensors | sha256sum` prints the same.
    """
    return sha256_files(folder, Path(folder).glob(WEIGHTS))


def weights_of(folder: str | Path) -> str:
    """What to call a folder's weights in a message."""
    names = sorted(path.name for path in Path(folder).glob(WEIGHTS))
    return f"{folder}/{names[0] if len(names) == 1 else WEIGHTS}"


def load_reported(folder: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A causal language model of transformers, and its report on what it found for which weight."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **options)
    model, report = loaded
    return model, report


def check_loaded(what: str | Path, report: dict[str, Any]) -> None:
    """Raise UserError for what the library's report on a folder or a file says is missing or of another shape."""
    for key, fault in (("missing_keys", "missing"), ("mismatched_keys", "of another shape than config.json says")):
        if names := sorted(name if isinstance(name, str) else name[0] for name in report[key]):
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            place = what if Path(what).is_file() else weights_of(what)
            raise UserError(f"{place}: weight {names[0]} is {fault}{more}; {WHOLE_MODEL}")
