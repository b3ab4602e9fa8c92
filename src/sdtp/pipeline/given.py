"""What a person names on the command line of a tool: a model, its tokenizer, a pruner, a file with a prompt."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sdtp.errors import UserError
from sdtp.pipeline.architecture import check_architecture
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import choose_dtype
from sdtp.pipeline.prompts import beginning, encode, render
from sdtp.pruning.pruner import TokenPruner

STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Given:
    """A prompt and what it goes through.

    Attributes:
        model: for inference, unhooked.
        tokenizer: its.
        pruner: as it is asked for.
        ids: of the prompt's tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pruner: TokenPruner
    ids: list[int]


def load(args: argparse.Namespace, new_tokens: int = 0) -> Given:
    """What the arguments `prompt`, `model`, `pruner`, `ratio`, `raw`, `dtype`, `attention`, `trust_remote_code` name.

    Args:
        args: the arguments.
        new_tokens: what the model's context has to hold beside the prompt.

    Raises:
        UserError: something is not there or of no use; the weights are read last.
    """
    text = read_prompt(args.prompt)
    pruner = load_pruner(args.pruner, args.ratio)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    ids = prompt_ids(tokenizer, text, raw=args.raw)
    dtype = choose_dtype(args.dtype, choose_device())
    model = load_model(args.model, dtype, args.attention, args.trust_remote_code)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    check_context({"the prompt": len(ids), "new tokens": new_tokens}, context)
    return Given(model, tokenizer, pruner, ids)


def quiet_libraries() -> None:
    """Leave what a tool prints to the tool: no warnings of transformers, no progress bars of it outside a terminal."""
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_model(name: str, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """A model for inference on this process's device, from safetensors only.

    Args:
        name: hub id, or folder of `save_pretrained` or of `sdtp model`.
        dtype: of the weights.
        attention: kernel.
        trust_remote_code: run the model's own Python code.

    Raises:
        UserError: no such model or kernel, or a model that cannot be pruned, told before its weights are read.
    """
    _check_folder(name)
    try:
        check_architecture(name, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except UserError as error:
        raise UserError(f"--model: {str(error).removeprefix('model.source: ')}") from error
    except (OSError, ImportError, ValueError) as error:  # no such model, or no such kernel for it or on this machine
        raise UserError(f"--model {name}: {' '.join(str(error).split())}") from error
    made: PreTrainedModel = model.to(choose_device()).eval().requires_grad_(False)
    return made


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a folder. Raises UserError where there is none."""
    _check_folder(name)
    try:
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"--model {name}: no tokenizer: {' '.join(str(error).split())}") from error
    return made


def _check_folder(name: str) -> None:
    """Raise UserError for what can only be a folder, and is none: transformers would speak of hub ids."""
    if not Path(name).is_dir() and (name.startswith(("/", ".", "~")) or name.strip("/").count("/") > 1):
        raise UserError(f"--model {name}: there is no such folder; a folder of a model, or a hub id, is needed")


def load_pruner(folder: Path, ratio: float | None = None) -> TokenPruner:
    """The pruner that `save_pretrained` wrote, at its own numbers or those of a ratio, as `pruner(model, ratio=)`.

    Raises:
        UserError: no pruner, a damaged one, or a ratio outside (0, 1].
    """
    try:
        pruner = TokenPruner.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--pruner {folder}: {error}") from error
    if ratio is None:
        return pruner
    try:
        return pruner.with_schedule(pruner.schedule.with_ratio(ratio))
    except ValueError as error:
        raise UserError(f"--ratio: {error}") from error


def read_prompt(path: str) -> str:
    """The text of a UTF-8 file, or of standard input for `-`, without its final line break, which editors add.

    Raises:
        UserError: no such file, no text in it, or bytes that are not UTF-8.
    """
    name = "standard input" if path == STDIN else path
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; a text file is needed, or {STDIN} for standard input") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8: {error.reason}") from error
    if not text.strip():
        raise UserError(f"{name}: there is no text in it")
    return text.removesuffix("\n").removesuffix("\r")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, raw: bool) -> list[int]:
    """Token ids of a prompt: one user message in the tokenizer's chat template, or the text itself.

    Args:
        tokenizer: the model's.
        text: the prompt.
        raw: the text itself, after what the tokenizer puts before any text, even where there is a template.

    Raises:
        UserError: the template does not take a user's message alone.
    """
    if raw or tokenizer.chat_template is None:
        return beginning(tokenizer) + encode(tokenizer, text)
    try:
        return encode(tokenizer, render(tokenizer, text))
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template takes no lone user message: {error}; --raw leaves it out") from error
