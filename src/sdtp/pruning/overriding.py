"""Instance attributes that stand in for a class's while a context is open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the instance attribute `name` hides the class's, or the instance's own."""
    own = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
    owner.__dict__[name] = value
    try:
        yield
    finally:
        del owner.__dict__[name]
        owner.__dict__.update(own)
