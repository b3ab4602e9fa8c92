"""Whether the workflow can prune and count a model, told from its config alone: refusals only, no result."""

from __future__ import annotations

from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.reading import read_json, reason
from sdtp.pruning import flops
from sdtp.pruning.adapter import decoder_layers

SUPPORTED = (
    "supported are decoders with full or sliding attention: Llama, Qwen, Mistral, Gemma 3, Phi-3, GPT-NeoX, OPT, "
    "mixtures of experts and others built like them"
)


def check_architecture(model: str | Path, *, revision: str | None = None, trust_remote_code: bool) -> None:
    """Raise UserError unless `model`, a folder or a hub id at `revision`, is one the workflow supports.

    Of the model only config.json is read, and its own code where `trust_remote_code`: its layers are made on the meta
    device, without weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(model, "config.json")
    place = path if path.is_file() else model
    if path.is_file():
        read_json(path)
    try:
        config = AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a type of model that transformers does not know, a number that is none
        raise UserError(f"model.source: {place}: {reason(error)}") from error
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the numbers in the file make a layer raise
        # The lines after the first list every class there is.
        why = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"model.source: {place} is no causal language model: {why}; {SUPPORTED}") from error
    try:
        decoder_layers(made)
    except TypeError as error:
        raise UserError(f"model.source: {model}: {error}; {SUPPORTED}") from error
    except Exception as error:  # numbers that made layers all the same
        raise UserError(f"model.source: {place}: {reason(error)}; {SUPPORTED}") from error
    try:
        flops.prefill(config, 1)  # the tables need it
    except ValueError as error:
        raise UserError(f"model.source: {model}: {error}") from error
