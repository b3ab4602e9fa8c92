"""Where a model comes from (a hub, a folder, an installed package), made one plain folder that every step loads."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.pipeline.architecture import check_architecture
from sdtp.pipeline.block import Source
from sdtp.pipeline.corpus import package_files
from sdtp.pipeline.files import atomic_folder, sha256_file
from sdtp.pipeline.gguf_file import check_gguf
from sdtp.pipeline.hub import asking_hub
from sdtp.pipeline.models import WEIGHTS, WHOLE_MODEL, check_loaded, load_reported, weights_of, weights_sha256
from sdtp.pipeline.reading import inside, read_json, reading

MANIFEST = "manifest.json"

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
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


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
        with reading(weights_of(folder), WHOLE_MODEL):
            _, report = load_reported(
                folder,
                device_map="meta",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
            )
    finally:
        transformers_logging.set_verbosity(level)
    check_loaded(folder, report)


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

    dequantised, report = load_reported(path.parent, gguf_file=path.name, dtype=torch.float32)
    check_loaded(path, report)
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
    if not any(fnmatch(name, WEIGHTS) for name in names):
        raise UserError(_no_safetensors(f"folder {source.ref!r}", names))
    check_architecture(path, trust_remote_code=trust_remote_code)
    _check_weights(path, trust_remote_code)
    sha256 = weights_sha256(path)
    _verify(f"weights in {source.ref}", source.sha256, sha256)
    for file in _taken(path, trust_remote_code):
        shutil.copyfile(file, folder / file.name)
    return None, sha256, _card_licence(path)


def _from_hub(source: Source, folder: Path, trust_remote_code: bool) -> tuple[str, str, str]:
    from huggingface_hub import HfApi, constants, snapshot_download

    # Into the hub's own cache, where an interrupted download goes on; weights in subfolders are other formats.
    download = functools.partial(
        snapshot_download,
        source.ref,
        allow_patterns=_patterns(trust_remote_code),
        ignore_patterns=["*/*", MANIFEST],
    )
    with asking_hub(source, "model.source"):
        if constants.HF_HUB_OFFLINE:
            # The cache has a folder for each commit.
            cached = Path(download(revision=source.revision, local_files_only=True))
            commit, names = cached.name, os.listdir(cached)
        else:
            info = HfApi().model_info(source.ref, revision=source.revision)
            commit, names = str(info.sha), [sibling.rfilename for sibling in info.siblings or []]
        if not any(fnmatch(name, WEIGHTS) for name in names):
            raise UserError(_no_safetensors(f"hub model {source.ref!r}", names))
        check_architecture(source.ref, revision=commit, trust_remote_code=trust_remote_code)
        snapshot = Path(download(revision=commit))
    _check_weights(snapshot, trust_remote_code)
    sha256 = weights_sha256(snapshot)
    _verify(f"weights of {source.ref}", source.sha256, sha256)
    # The cache also holds what others have downloaded of the revision.
    for file in _taken(snapshot, trust_remote_code):
        _link_or_copy(file.resolve(), folder / file.name)
    return commit, sha256, _card_licence(folder)


def _patterns(trust_remote_code: bool) -> list[str]:
    code = ["*.py"] if trust_remote_code else []
    return [WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "README.md", *code]


def _taken(folder: Path, trust_remote_code: bool) -> list[Path]:
    """The files directly in a folder that belong to a model, but for a manifest, in whose place ours is written."""
    patterns = _patterns(trust_remote_code)
    files = [file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST]
    return [file for file in files if any(fnmatch(file.name, one) for one in patterns)]


def _link_or_copy(file: Path, target: Path) -> None:
    """A hard link, since the cache never changes a file and 7B weights are 15 GB; a copy on another file system."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _no_safetensors(where: str, names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(_PICKLES)]
    refused = f" ({', '.join(pickled)}: pickled weights can run code when loaded and are refused)" if pickled else ""
    return f"model.source.ref: {where} has no {WEIGHTS} weights{refused}; convert it to safetensors first"


def _card_licence(folder: Path) -> str:
    """The `license:` line of a model card's header, or "not stated"."""
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    match = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    return match.group(1) if match else "not stated"


def _describe(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Parameters and dtype counted from the safetensors headers, the rest from config.json; no weight is read."""
    from safetensors import safe_open
    from transformers import AutoConfig

    parameters, dtypes = 0, set()
    for path in sorted(folder.glob(WEIGHTS)):
        with reading(path, WHOLE_MODEL), safe_open(path, framework="pt") as tensors:
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
