"""Figures 1 and 2 of the paper: where saliency lies, and how few tokens are salient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdtp.errors import UserError
from sdtp.evaluation.stats import mean_interval
from sdtp.pipeline.paper.part import Part, Value, part
from sdtp.pipeline.paper.published import Numbers

# The paper's: a token is salient where its saliency is above this share of the largest of its prompt and layer.
SALIENT = 0.1
MAP_ABOUT = (
    "The paper's saliency map of one prompt: the states entering each pruning layer of the unpruned model. The table's "
    "rows are the tokens with the largest share of a layer's saliency; the file holds every token of every layer."
)
SPARSITY_ABOUT = (
    "The paper counts a token as salient where its saliency is above a tenth of the largest in its prompt and layer, "
    "and shows that the deeper the layer, the fewer they are. Here it is the mean over the examples that have "
    "labels, with a 95% interval and the quartiles of the examples."
)


def figure_1(scores: np.ndarray, layers: Sequence[int], tokens: Sequence[str], published: Numbers) -> Part:
    """The map as numbers: a row each layer and token.

    Args:
        scores: [stages, tokens], finite; magnitudes count.
        layers: [stages], the decoder layer each stage's hidden states enter.
        tokens: [tokens], their texts.
        published: the paper's numbers.
    """
    magnitude = np.abs(scores.astype(np.float64))
    totals = magnitude.sum(axis=1, keepdims=True)
    if magnitude.shape != (len(layers), len(tokens)) or not np.isfinite(totals).all() or (totals == 0).any():
        raise UserError(
            f"saliency of shape {magnitude.shape} for {len(layers)} layers and {len(tokens)} tokens; accepted: one "
            "number each, finite, and one above zero a layer"
        )
    rows = [
        {"layer": layer, "position": position, "token": token, "saliency": value, "share": value / total}
        for layer, values, total in zip(layers, magnitude.tolist(), totals[:, 0].tolist(), strict=True)
        for position, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    keys = {"layer": "Layer", "position": "Position", "token": "Token"}
    values = (Value("saliency", "Saliency", published=False), Value("share", "Share of the layer's", published=False))
    return part("figure-1", MAP_ABOUT, keys, values, rows, published, lambda row: str(row["layer"]))


def salient(scores: np.ndarray) -> np.ndarray:
    """Share of tokens whose saliency is above `SALIENT` of their layer's largest.

    Args:
        scores: [stages, tokens]; magnitudes count.

    Returns:
        [stages], each in (0, 1].
    """
    magnitude = np.abs(scores.astype(np.float64))
    largest = magnitude.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all() or (largest == 0).any():
        raise UserError("saliency of a stage is zero everywhere or not finite; accepted: finite, one above zero")
    return np.asarray((magnitude > SALIENT * largest).mean(axis=1))


def figure_2(examples: Sequence[np.ndarray], layers: Sequence[int], published: Numbers) -> Part:
    """A row each layer: the mean share of salient tokens over the examples, and its spread.

    Args:
        examples: each [stages, tokens] of saliency.
        layers: [stages], decoder layers.
        published: the paper's numbers.
    """
    shares = np.stack([salient(scores) for scores in examples])  # [examples, stages]
    rows = []
    for layer, column in zip(layers, shares.T, strict=True):
        low, high = np.clip(mean_interval(column.tolist()), 0.0, 1.0).tolist()
        quarter, three_quarters = np.quantile(column, (0.25, 0.75))
        rows.append(
            {
                "layer": layer,
                "salient": column.mean(),
                "salient_low": low,
                "salient_high": high,
                "q25": quarter,
                "q75": three_quarters,
                "n": len(column),
            }
        )
    values = (
        Value("salient", "Salient tokens, share", interval=True),
        Value("q25", "Lower quartile", published=False),
        Value("q75", "Upper quartile", published=False),
    )
    return part("figure-2", SPARSITY_ABOUT, {"layer": "Layer"}, values, rows, published, lambda row: str(row["layer"]))
