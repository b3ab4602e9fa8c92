"""The paper's two observations on saliency, as numbers: few tokens carry it, and early layers foretell late ones."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from sdtp.errors import UserError
from sdtp.evaluation.stats import LEVEL

logger = logging.getLogger(__name__)

# Shares of the saliency whose tokens are counted.
MASSES = (0.9, 0.8, 0.5)
SPARSITY_COLUMNS = ["layer", "mass", "share", "ci_low", "ci_high", "q25", "q75", "n"]
FORESIGHT_COLUMNS = ["layer", "later_layer", "correlation", "ci_low", "ci_high", "q25", "q75", "n"]


def telling(scores: Mapping[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    """The examples that have something to say here; a warning counts the others and names the first.

    These have at every stage two tokens whose magnitudes differ. A prompt of one token has not, nor one on which the
    response does not depend.

    Args:
        scores: by id [stages, tokens].
        source: where they were read, for messages.

    Raises:
        UserError: no example has.
    """
    found = {name: values for name, values in scores.items() if (np.ptp(np.abs(values), axis=1) > 0).all()}
    if not found:
        raise UserError(f"{source}: in no example does every stage's saliency differ between two tokens")
    if len(found) < len(scores):
        logger.warning(
            "%s: %d of %d examples are in no figure, for a stage's saliency is the same for each of their tokens; the "
            "first is %r",
            source,
            len(scores) - len(found),
            len(scores),
            next(name for name in scores if name not in found),
        )
    return found


def sparsity_table(examples: Sequence[np.ndarray], layers: Sequence[int]) -> pd.DataFrame:
    """One row per layer and mass: the mean over the examples of `salient_share`, its 95% interval, and their quartiles.

    Args:
        examples: each [stages, tokens] of saliency, as `telling` leaves them.
        layers: [stages], the decoder layer each stage's hidden states enter.
    """
    rows = []
    for mass in MASSES:
        shares = np.stack([salient_share(scores, mass) for scores in examples])  # [examples, stages]
        rows += [(layer, mass, *_summary(of_layer)) for layer, of_layer in zip(layers, shares.T, strict=True)]
    return pd.DataFrame(rows, columns=SPARSITY_COLUMNS).sort_values("layer", kind="stable", ignore_index=True)


def foresight_table(examples: Sequence[np.ndarray], layers: Sequence[int]) -> pd.DataFrame:
    """One row per pair of layers, an earlier and a later one: the mean over the examples of `rank_correlations`.

    With its 95% interval, and the quartiles of the examples; arguments as `sparsity_table` has them.
    """
    correlations = np.stack([rank_correlations(scores) for scores in examples])  # [examples, stages, stages]
    rows = [
        (layers[early], layers[late], *_summary(correlations[:, early, late]))
        for early, late in combinations(range(len(layers)), 2)
    ]
    return pd.DataFrame(rows, columns=FORESIGHT_COLUMNS)


def _summary(values: np.ndarray) -> Iterator[float]:
    """Mean, its interval, quartiles and number of values [examples].

    The interval is Student's: every labelled example counts, thousands at the paper's scale, of which resampling would
    take a minute and gigabytes for each row, and means of that many bounded values are as good as normal.
    """
    mean, half, n = float(values.mean()), np.nan, len(values)
    if n > 1:  # one says nothing of the spread
        half = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    yield from (mean, mean - half, mean + half)
    yield from np.quantile(values, (0.25, 0.75)).tolist()
    yield n


def salient_share(scores: np.ndarray, mass: float) -> np.ndarray:
    """The smallest share of tokens whose saliency adds up to at least `mass` of the stage's total.

    Args:
        scores: [stages, tokens], finite; magnitudes are counted.
        mass: share of the total, in (0, 1].

    Returns:
        [stages], each in (0, 1]: 0.1 means that a tenth of the tokens carries `mass` of the saliency.
    """
    magnitude = -np.sort(-np.abs(scores.astype(np.float64)), axis=1)
    total = magnitude.sum(axis=1, keepdims=True)
    if not np.isfinite(total).all() or (total == 0).any():
        raise UserError("saliency of a stage sums to zero or is not finite; accepted: finite, at least one above zero")
    # The tolerance keeps a share that is met exactly from needing one token more by rounding.
    needed = (np.cumsum(magnitude, axis=1) < (mass - 1e-9) * total).sum(axis=1) + 1
    return np.asarray(needed / scores.shape[1])


def rank_correlations(scores: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of a prompt's saliency between every two stages; of magnitudes, ties counted.

    Args:
        scores: [stages, tokens], finite, with two tokens that differ at every stage.

    Returns:
        [stages, stages] in [-1, 1], symmetric, 1 on the diagonal.
    """
    ranks = stats.rankdata(np.abs(scores), axis=1)
    if not np.isfinite(scores).all() or (np.ptp(ranks, axis=1) == 0).any():
        raise UserError("saliency of a stage is not finite, or the same for every token; accepted: two that differ")
    return np.atleast_2d(np.corrcoef(ranks))
