"""SDTP: saliency-driven dynamic token pruning for decoder language models (arXiv 2504.04514)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtp.pruning import flops, scorers
    from sdtp.pruning.chat import protect_messages
    from sdtp.pruning.pruner import TokenPruner
    from sdtp.pruning.schedule import PruningSchedule

__all__ = ["PruningSchedule", "TokenPruner", "flops", "protect_messages", "scorers"]

# Imported on first use: importing any module of the package runs this file, and the command line and the workflow's dry
# run must not wait for torch.
_MODULES = ("flops", "scorers")
_MEMBERS = {
    "PruningSchedule": "sdtp.pruning.schedule",
    "TokenPruner": "sdtp.pruning.pruner",
    "protect_messages": "sdtp.pruning.chat",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Not at import: a Snakemake in another environment finds the package by its folder, where it has no metadata.
        return importlib.import_module("importlib.metadata").version("sdtp")
    if name in _MODULES:
        return importlib.import_module(f"sdtp.pruning.{name}")
    if name in _MEMBERS:
        return getattr(importlib.import_module(_MEMBERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
