"""What a check says, and words that several checks share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "warning", "failure"]

INSTALL = "`make install` sets up .venv, or: pip install"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of what was checked.
        status: a failure stops the workflow or makes it useless, a warning takes something away from it.
        found: in one line.
        advice: what to do; empty where all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def import_torch() -> Any:
    """torch, or what went wrong importing it, as text."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that it was built with
        return f"{type(error).__name__}: {one_line(error)}"
    return torch


def one_line(error: object) -> str:
    """What an error says, on one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
