"""Rows of tables."""

from __future__ import annotations

from typing import Any

import pandas as pd


def only(table: pd.DataFrame, **values: Any) -> pd.Series:
    """The one row that holds `values`."""
    for column, value in values.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]
