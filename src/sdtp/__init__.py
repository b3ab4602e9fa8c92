"""SDTP: saliency-driven dynamic token pruning for decoder language models (arXiv 2504.04514)."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtp.pruning import flops, scorers
    from sdtp.pruning.pruner import TokenPruner
    from sdtp.pruning.schedule import PruningSchedule

__all__ = ["PruningSchedule", "TokenPruner", "flops", "scorers"]
__version__ = version("sdtp")

# Imported on first use: importing any module of the package runs this file, and the command line and the workflow's dry
# run must not wait for torch.
_MODULES = ("flops", "scorers")
_CLASSES = {"PruningSchedule": "sdtp.pruning.schedule", "TokenPruner": "sdtp.pruning.pruner"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"sdtp.pruning.{name}")
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
