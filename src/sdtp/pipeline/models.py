"""A causal language model and its tokenizer: fetched once into a plain folder, loaded from there by every step."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp.errors import UserError
from sdtp.pipeline.architecture import check_architecture
from sdtp.pipeline.block import Source
from sdtp.pipeline.corpus import package_files
from sdtp.pipeline.files import atomic_folder, sha256_file, sha256_files
from sdtp.pipeline.gguf_file import check_gguf
from sdtp.pipeline.prompts import render
from sdtp.pipeline.reading import inside, read_json, reading

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = ("sdpa", "eager", "flash_attention_2")
# What transformers loads; some repositories hold the same weights once more under other names.
_WEIGHTS = "model*.safetensors"
_WHOLE_MODEL = "the whole weights of the model that config.json describes are needed, as safetensors"
# Weights in pickles can run code when loaded: they are named in errors, and never fetched.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch_model(source: Source, output: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Makes folder `output`: safetensors weights, config, tokenizer files and manifest.json; whole or absent.

    Args:
        source: `hub` (a repository at a revision), `local` (a folder of save_pretrained) or `package` (a GGUF file in
            an installed Python distribution, as `distribution/file.gguf`; dequantised to float32, never imported).
            A pinned `sha256` is that of the GGUF file, or of a folder's weights as `weights_sha256` counts it.
        output: replaced as a whole.
        trust_remote_code: also fetch the repository's own Python files, and run them when loading.

    Returns:
        The manifest: source, sha256, revision, parameters, dtype, model_type, num_layers, context_length, licence.

    Raises:
        UserError: no such model, one the pruner does not support (no weight is downloaded or copied then), pickled
            weights only, weights that are damaged or not all there, or a checksum other than the pinned one.
    """
    revision: str | None
    with atomic_folder(output) as folder:
        if source.kind == "package":
            revision, sha256, licence = _from_package(source, folder)
        elif source.kind == "local":
            revision, sha256, licence = _from_folder(source, folder, trust_remote_code)
        elif source.kind == "hub":
            revision, sha256, licence = _from_hub(source, folder, trust_remote_code)
        else:
            raise UserError(f"model.source.kind: {source.kind!r} holds no model; accepted: hub, local, package")
        manifest = {
            "source": {"kind": source.kind, "ref": source.ref, "revision": revision},
            "sha256": sha256,
            "weights_sha256": weights_sha256(folder),
            "licence": licence,
            "trust_remote_code": trust_remote_code,
            **_describe(folder, trust_remote_code),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


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
    with reading(_weights_of(folder), _WHOLE_MODEL):
        model, report = _load(
            folder,
            dtype=number_format,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trusted,
            **(spread or {}),
        )
    _check_loaded(folder, report)
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
    return sha256_files(folder, Path(folder).glob(_WEIGHTS))


def _weights_of(folder: str | Path) -> str:
    """What to call a folder's weights in a message."""
    names = sorted(path.name for path in Path(folder).glob(_WEIGHTS))
    return f"{folder}/{names[0] if len(names) == 1 else _WEIGHTS}"


def _check_weights(folder: Path, trust_remote_code: bool) -> None:
    """Raise UserError unless the folder's weights are those of its config: all there, each of its shape.

    A weight that is missing would be drawn at random, with no more than a warning. None is read.
    """
    from transformers.utils import logging as transformers_logging

    for path in sorted(folder.glob("*.safetensors.index.json")):
        for name in sorted(set(map(str, read_json(path)["weight_map"].values()))):
            if not inside(folder, name, path).is_file():
                raise UserError(f"{path}: it names the file {name!r}, which is not there")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # the report would go on for pages
    try:
        with reading(_weights_of(folder), _WHOLE_MODEL):
            _, report = _load(
                folder,
                device_map="meta",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
            )
    finally:
        transformers_logging.set_verbosity(level)
    _check_loaded(folder, report)


def _load(folder: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A causal language model of transformers, and its report on what it found for which weight."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **options)
    model, report = loaded
    return model, report


def _check_loaded(what: str | Path, report: dict[str, Any]) -> None:
    """Raise UserError for what the library's report on a folder or a file says is missing or of another shape."""
    for key, fault in (("missing_keys", "missing"), ("mismatched_keys", "of another shape than config.json says")):
        if names := sorted(name if isinstance(name, str) else name[0] for name in report[key]):
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            place = what if Path(what).is_file() else _weights_of(what)
            raise UserError(f"{place}: weight {names[0]} is {fault}{more}; {_WHOLE_MODEL}")


def _verify(name: str, expected: str | None, found: str) -> None:
    if expected is not None and expected != found:
        raise UserError(f"model.source.sha256: {name}: expected {expected}, found {found}")


def _from_package(source: Source, folder: Path) -> tuple[str, str, str]:
    """Dequantises a GGUF file of an installed distribution into `folder`: (version, sha256 of the file, licence)."""
    distribution, _, name = source.ref.partition("/")
    if not name.endswith(".gguf"):
        raise UserError(f"model.source.ref: {source.ref!r}; a package source is <distribution>/<file>.gguf")
    paths = [path for path in package_files(distribution) if path.name == name]
    if len(paths) != 1:
        raise UserError(
            f"model.source.ref: package {distribution!r} has {len(paths)} files named {name!r}; 1 is needed"
        )
    sha256 = sha256_file(paths[0])
    _verify(str(paths[0]), source.sha256, sha256)
    check_gguf(paths[0])
    with reading(paths[0], "a GGUF file of a model and its tokenizer is needed"):
        licence = _convert_gguf(paths[0], folder)
    check_architecture(folder, trust_remote_code=False)
    return importlib.metadata.version(distribution), sha256, licence


def _convert_gguf(path: Path, folder: Path) -> str:
    """Writes a GGUF model as float32 safetensors with its tokenizer; returns the licence its header states."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    dequantised, report = _load(path.parent, gguf_file=path.name, dtype=torch.float32)
    _check_loaded(path, report)
    # A model that was quantised refuses to be saved, although its weights are plain now: move them into a plain one.
    del dequantised.config.quantization_config
    model = type(dequantised)(dequantised.config)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    field = GGUFReader(path).get_field("general.license")
    return "not stated" if field is None else str(field.contents())


def _from_folder(source: Source, folder: Path, trust_remote_code: bool) -> tuple[None, str, str]:
    path = Path(source.ref)
    if not (path / "config.json").is_file():
        raise UserError(f"model.source.ref: {source.ref!r} has no config.json; a folder of save_pretrained is needed")
    names = [file.name for file in path.iterdir()]
    if not any(fnmatch(name, _WEIGHTS) for name in names):
        raise UserError(_no_safetensors(f"folder {source.ref!r}", names))
    check_architecture(path, trust_remote_code=trust_remote_code)
    _check_weights(path, trust_remote_code)
    sha256 = weights_sha256(path)
    _verify(f"weights in {source.ref}", source.sha256, sha256)
    for name in names:
        if any(fnmatch(name, pattern) for pattern in _patterns(trust_remote_code)):
            shutil.copyfile(path / name, folder / name)
    return None, sha256, _card_licence(path)


def _from_hub(source: Source, folder: Path, trust_remote_code: bool) -> tuple[str, str, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(source.ref, revision=source.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"model.source: no {source.ref!r} at revision {source.revision!r} on the hub") from error
    names = [sibling.rfilename for sibling in info.siblings or []]
    if not any(fnmatch(name, _WEIGHTS) for name in names):
        raise UserError(_no_safetensors(f"hub model {source.ref!r}", names))
    check_architecture(source.ref, revision=info.sha, trust_remote_code=trust_remote_code)
    # Into the hub's own cache, where an interrupted download goes on; weights in subfolders are other formats.
    snapshot = Path(
        snapshot_download(
            source.ref, revision=info.sha, allow_patterns=_patterns(trust_remote_code), ignore_patterns=["*/*"]
        )
    )
    _check_weights(snapshot, trust_remote_code)
    sha256 = weights_sha256(snapshot)
    _verify(f"weights of {source.ref}", source.sha256, sha256)
    for file in snapshot.iterdir():
        _link_or_copy(file.resolve(), folder / file.name)
    return str(info.sha), sha256, _card_licence(folder)


def _patterns(trust_remote_code: bool) -> list[str]:
    code = ["*.py"] if trust_remote_code else []
    return [_WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "README.md", *code]


def _link_or_copy(file: Path, target: Path) -> None:
    """A hard link, since the cache never changes a file and 7B weights are 15 GB; a copy on another file system."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _no_safetensors(where: str, names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(_PICKLES)]
    refused = f" ({', '.join(pickled)}: pickled weights can run code when loaded and are refused)" if pickled else ""
    return f"model.source.ref: {where} has no {_WEIGHTS} weights{refused}; convert it to safetensors first"


def _card_licence(folder: Path) -> str:
    """The `license:` line of a model card's header, or "not stated"."""
    card = folder / "README.md"
    match = re.search(r"^license: *(\S+)", card.read_text("utf-8"), re.MULTILINE) if card.is_file() else None
    return match.group(1) if match else "not stated"


def _describe(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Parameters and dtype counted from the safetensors headers, the rest from config.json; no weight is read."""
    from safetensors import safe_open
    from transformers import AutoConfig

    parameters, dtypes = 0, set()
    for path in sorted(folder.glob(_WEIGHTS)):
        with reading(path, _WHOLE_MODEL), safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                view = tensors.get_slice(name)
                size = 1
                for length in view.get_shape():
                    size *= length
                parameters += size
                dtypes.add(view.get_dtype())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return {
        "parameters": parameters,
        "dtype": "+".join(sorted(dtypes)),
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", None),
    }
