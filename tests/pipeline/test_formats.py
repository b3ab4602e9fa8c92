from __future__ import annotations

from typing import Any

import pytest

from sdtp.pipeline.formats import change, flatten, memory, number, signed

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (0, "0"), (0.0123, "0.0123"), (0.00444, "0.00444"), (0.0999, "0.0999"), (0.756, "0.756"),
     (0.5, "0.500"), (0.9996, "1.00"), (0.9994, "0.999"), (1.5, "1.50"), (9.996, "10.0"), (12.34, "12.3"),
     (134.5678, "135"), (2048, "2,048"), (15310.2, "15,310"), (12345678, "12,345,678"), (-0.5, "−0.500"),
     (-0.01234, "−0.0123"), (-1234.5, "−1,234"), (-3, "−3"), (0.001, "0.00100"), (0.0009996, "0.00100"),
     (0.00025, "2.50e-04"), (-0.00025, "−2.50e-04"), (NAN, "–")],
)  # fmt: skip
def test_number(value: Any, text: Any) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0123, "+0.0123"), (-0.0123, "−0.0123"), (0.0, "0"), (NAN, "–")])
def test_signed(value: Any, text: Any) -> None:
    assert signed(value) == text


@pytest.mark.parametrize(("value", "text"), [(-0.332, "−33%"), (0.014, "+1%"), (NAN, "–")])
def test_change(value: Any, text: Any) -> None:
    assert change(value) == text


@pytest.mark.parametrize(("value", "text"), [(22.5 * 2**20, "22.5 MiB"), (48 * 2**30, "48.0 GiB"), (NAN, "–")])
def test_memory(value: Any, text: Any) -> None:
    assert memory(value) == text


def test_flatten_keeps_lists_and_dots_nested_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
