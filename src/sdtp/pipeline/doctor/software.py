"""Python and the packages that are needed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from sdtp.pipeline.doctor.finding import INSTALL, Finding


def python() -> Finding:
    """The interpreter, and the environment it is of."""
    isolated = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    found = f"{platform.python_version()}, {sys.prefix}"
    if isolated:
        return Finding("Python", "ok", found)
    return Finding("Python", "ok", f"{found} (the system's own, no virtual environment)")


def library() -> Finding:
    """What `import sdtp` and pruning need."""
    wrong = _wrong_packages("")
    if wrong:
        return Finding("library", "failure", "; ".join(wrong), f"{INSTALL} sdtp")
    names = ("sdtp", "torch", "transformers", "safetensors")
    return Finding("library", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def workflow() -> Finding:
    """What the steps of the workflow need on top."""
    wrong = _wrong_packages("pipeline")
    if wrong:
        advice = f"{INSTALL} 'sdtp[pipeline]'; pruning from Python works without"
        return Finding("workflow", "warning", "; ".join(wrong), advice)
    names = ("snakemake", "mlflow", "datasets", "accelerate")
    return Finding("workflow", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def _wrong_packages(extra: str) -> list[str]:
    """The required packages that are missing or of another version than the package asks for."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # transformers needs it
        return ["packaging is not installed"]
    wrong = []
    for requirement in map(Requirement, importlib.metadata.requires("sdtp") or []):
        of_extra = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        if not (of_extra if extra else requirement.marker is None):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed, {requirement.specifier} is needed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, {requirement.specifier} is needed")
    return wrong
