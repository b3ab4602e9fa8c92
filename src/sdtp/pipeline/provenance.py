"""Tags that say where a run comes from: code, configuration, inputs, machine, versions."""

import os
import platform
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdtp.pipeline.files import sha256_file, sha256_files

PACKAGES = ("sdtp", "torch", "transformers", "datasets", "safetensors", "numpy", "mlflow", "snakemake")
# Arguments of steps that name what they write, or resume from, beside their declared outputs.
WRITTEN = frozenset({"checkpoint", "checkpoints", "metrics", "output"})


def origin(facts: Mapping[str, Any]) -> dict[str, str]:
    """Tags of the code, the configuration, the machine and the library versions.

    facts: `git_commit`, `git_dirty` and `config_sha256`, as far as they are known.
    """
    tags = {
        "mlflow.source.git.commit": facts.get("git_commit", "unknown"),
        "sdtp.git_dirty": facts.get("git_dirty", "unknown"),
        "sdtp.config_sha256": facts.get("config_sha256", "unknown"),
        "sdtp.host": socket.gethostname(),
        "sdtp.gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "sdtp.version.python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            tags[f"sdtp.version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return tags


def variant(output: Path, run: str) -> dict[str, str]:
    """The tag of an output below variants/<variant>/ of a run's folder, or of its paper/; no tag for any other."""
    folders = output.parts[:-1]
    for at, folder in enumerate(folders[:-1]):
        if folder == "variants" and (folders[:at][-1:] == (run,) or folders[:at][-2:] == (run, "paper")):
            return {"sdtp.variant": folders[at + 1]}
    return {}


def git() -> tuple[str, str]:
    """The commit checked out in the working folder, and "true" where files differ from it; "unknown" without git."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", "unknown"
    return commit.strip(), str(bool(changes.strip())).lower()


def inputs(arguments: Mapping[str, Any], outputs: Iterable[str | Path]) -> dict[str, list[Path]]:
    """What a step reads: of its arguments those that name files or folders which exist and that it does not write.

    arguments: by name; paths, and lists of paths, are looked at. outputs: what the step writes.
    """
    written = {Path(output).resolve() for output in outputs}
    read = {}
    for name, value in arguments.items():
        given = [value] if isinstance(value, Path) else value
        if name in WRITTEN or not isinstance(given, list | tuple) or not all(isinstance(path, Path) for path in given):
            continue
        paths = [path for path in given if path.exists() and path.resolve() not in written]
        if paths:
            read[name] = paths
    return read


def hashed(read: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Tags `sdtp.input.NAME` with one SHA-256 each; several files or folders give the same one in whatever order.

    Of a folder with a manifest.json, which holds the hashes of what is big, the manifest counts; of any other all
    files. What cannot be read has no tag: the step will say so.
    """
    tags = {}
    for name, paths in read.items():
        with suppress(OSError):
            hashes = sorted(map(_sha256, paths))
            one = hashes[0] if len(hashes) == 1 else sha256("\n".join(hashes).encode()).hexdigest()
            tags[f"sdtp.input.{name}"] = one
    return tags


def _sha256(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    if (path / "manifest.json").is_file():
        return sha256_file(path / "manifest.json")
    return sha256_folder(path)


def sha256_folder(folder: Path) -> str:
    """One SHA-256 for all files of a folder and below it, as `sha256_files`, but for the mark that Snakemake leaves."""
    own = (file for file in folder.rglob("*") if file.is_file() and file.name != ".snakemake_timestamp")
    return sha256_files(folder, own)
