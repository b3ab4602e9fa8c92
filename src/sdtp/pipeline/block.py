"""A typed block of settings, of which a step may be given some keys only; and the one block that stands in several."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


class Block:
    """Builds a frozen dataclass from the keys that were passed, which may be fewer than its fields."""

    _path: str

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Takes JSON values by field name; lists become tuples, objects the block their field names.

        Args:
            values: the settings, nested as in the config.
            path: dotted name of this block, for messages.

        Raises:
            ValueError: a key the block does not have.
        """
        fields = typing.get_type_hints(cls)
        block = object.__new__(cls)
        object.__setattr__(block, "_path", path)
        for key, value in values.items():
            name = f"{path}.{key}" if path else key
            if key not in fields or key.startswith("_"):
                accepted = ", ".join(field for field in fields if not field.startswith("_"))
                raise ValueError(f"setting {name} is not known; {path or 'settings'} has {accepted}")
            # A block that may be null is written `Source | None`.
            kinds = typing.get_args(fields[key]) or (fields[key],)
            kind = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Block)), None)
            if kind is not None and value is not None:
                value = kind.from_mapping(value, name)
            elif isinstance(value, list):
                value = tuple(value)
            object.__setattr__(block, key, value)
        return block

    def __repr__(self) -> str:
        passed = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({passed})"

    def __getattr__(self, key: str) -> Any:
        # Reached only for what was not passed; copy and pickle probe for names with underscores.
        if key.startswith("_"):
            raise AttributeError(key)
        raise AttributeError(f"setting {f'{self._path}.{key}' if self._path else key} was not passed to this step")


@dataclass(frozen=True, repr=False)
class Source(Block):
    """Where a model or a text comes from.

    Attributes:
        kind: `hub`, `local`, `package` or `jsonl`.
        ref: hub id, folder, file, or `distribution[/file]` of a Python package.
        revision: hub commit, branch or tag; None for the others.
        sha256: expected checksum of the file, None where none is pinned.
    """

    kind: str
    ref: str
    revision: str | None
    sha256: str | None
