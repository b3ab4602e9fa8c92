"""Frozen dataclasses from the plain values that JSON gives, every type checked: nothing is guessed or converted."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

_T = TypeVar("_T")

_LARGEST = 2**63  # numbers beyond are no setting of anything, and fail far from where they were read


def from_plain(cls: type[_T], value: Any, where: str) -> _T:
    """A dataclass from the dict that `dataclasses.asdict` made of it, maybe through JSON.

    Args:
        cls: a dataclass whose fields are int, float, str, bool, such a dataclass, a tuple of any length of one of
            these, or one of these or None.
        value: a dict with exactly the fields; lists stand for tuples, an int may stand for a float.
        where: what `value` is called in errors.

    Raises:
        ValueError: a missing or unknown key, a value of another type, a number that is huge or not finite, or what the
            class itself refuses; named with its place.
    """
    built: _T = _built(cls, value, where)
    return built


def _built(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _built(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_shown(value)}: a list is needed")
        return tuple(_built(typing.get_args(hint)[0], one, f"{where}[{index}]") for index, one in enumerate(value))
    if dataclasses.is_dataclass(hint):
        names = {field.name for field in dataclasses.fields(hint)}
        if type(value) is not dict:
            raise ValueError(f"{where} is {_shown(value)}: an object with {sorted(names)} is needed")
        if value.keys() != names:
            raise ValueError(f"{where} has keys {sorted(value)}: exactly {sorted(names)} are accepted")
        hints = typing.get_type_hints(hint)
        return hint(**{name: _built(hints[name], value[name], f"{where}.{name}") for name in value})  # type: ignore[operator]
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise ValueError(f"{where} is {_shown(value)}: {hint.__name__} is needed")
    if hint in (int, float) and not (math.isfinite(value) if type(value) is float else abs(value) < _LARGEST):
        raise ValueError(f"{where} is {_shown(value)}: a finite number of at most 19 digits is needed")
    return hint(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
