"""What files that must be whole or absent are written with: a name beside theirs, and being on the disk."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def temporary_sibling(path: Path) -> Path:
    """A new name in the folder of `path`, with its suffix, since writers choose a format by it."""
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
