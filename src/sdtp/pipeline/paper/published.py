"""The paper's own numbers, as far as they could be found in a source, and which models they are of."""

from __future__ import annotations

import re
from importlib.resources import files

import pandas as pd

COLUMNS = ["part", "model", "method", "keep_ratio", "place", "metric", "value", "source"]
# The paper's name of a model -> what its id or folder has in it, in lower case and without signs.
MODELS = {"Llama-2-7B": "llama27b", "Mistral-7B": "mistral7b", "BLOOM-7B": "bloom7b", "Qwen2-7B": "qwen27b"}


def model_of(ref: str) -> str | None:
    """The paper's name of the model with a hub id or in a folder; None for a model that the paper does not have."""
    plain = re.sub("[^a-z0-9]", "", ref.rstrip("/").rpartition("/")[2].lower())
    return next((name for name, letters in MODELS.items() if letters in plain), None)


def load() -> pd.DataFrame:
    """Every number that was found, one a row, with where it was found.

    Columns: part (a key of `names.PARTS`), model (a key of `MODELS`), method and keep ratio, place (the category, the
    task or the prompt length in tokens, as text), metric (the column of the part's table), value, source.
    """
    path = files("sdtp.pipeline.paper") / "published.csv"
    with path.open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"place": str})[COLUMNS]


# (method, keep ratio, place, metric) -> value.
Numbers = dict[tuple[str, float, str, str], float]


def numbers(part: str, ref: str, table: pd.DataFrame) -> Numbers:
    """The numbers of one part that are of the run's own model; none where the paper does not have it.

    Args:
        part: a key of `names.PARTS`.
        ref: `model.source.ref` of the run.
        table: as `load` gives it.
    """
    rows = table[(table["part"] == part) & (table["model"] == model_of(ref))]
    return {
        (row["method"], row["keep_ratio"], row["place"], row["metric"]): row["value"] for row in rows.to_dict("records")
    }
