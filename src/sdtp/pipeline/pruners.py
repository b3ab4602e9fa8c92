"""The pruner that a step reads from a folder of the run."""

from __future__ import annotations

from pathlib import Path

from sdtp.errors import UserError
from sdtp.pruning.pruner import TokenPruner


def read_pruner(folder: Path) -> TokenPruner:
    """What `TokenPruner.save_pretrained` wrote. Raises UserError where there is no pruner, or a damaged one."""
    try:
        return TokenPruner.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
