"""How the report writes numbers: as many digits as mean something, a true minus, a dash for what was not measured."""

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"


def number(value: float) -> str:
    """`value` to three significant digits, whole digits never cut, an int in full; in exponent form below 1e-3."""
    if math.isnan(value):
        return NOTHING
    if value == 0:
        return "0"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    # The exponent of the rounded value: 0.9996 is written as 1.00.
    text = f"{value:.2e}"
    exponent = int(text.partition("e")[2])
    if exponent >= -3:
        text = f"{value:,.{max(0, 2 - exponent)}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def signed(value: float) -> str:
    """`number` with its sign, for differences."""
    return f"+{number(value)}" if value > 0 else number(value)


def change(part: float) -> str:
    """A relative change as a signed percentage; a dash for NaN."""
    return NOTHING if math.isnan(part) else f"{100 * part:+.0f}%".replace("-", "−")


def memory(value: float) -> str:
    """Bytes as MiB, or GiB from 10 GiB on; a dash for NaN."""
    if math.isnan(value):
        return NOTHING
    mebibytes = value / 2**20
    return f"{number(mebibytes)} MiB" if mebibytes < 10 * 1024 else f"{number(mebibytes / 1024)} GiB"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
