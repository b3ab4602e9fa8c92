"""How far a scorer agrees with saliency where it has a choice."""

from __future__ import annotations

import math

import torch
from scipy.stats import kendalltau

from sdtp.training.policy import PolicyTrace


def stage_agreement(trace: PolicyTrace, saliency: torch.Tensor) -> tuple[float, float]:
    """Kendall's tau and top-k overlap of scores and saliency, mean over the stages.

    Both look at the tokens a stage decides on: those that enter it and are not protected. `k` is how many of them the
    stage keeps.

    Args:
        trace: of one forward without noise.
        saliency: [stages, prompt_tokens].

    Returns:
        tau in [-1, 1] (tau-b, ties counted) and overlap in [0, 1]; each NaN where no stage has a choice.
    """
    taus, overlaps = [], []
    for stage, scores in enumerate(trace.scores):
        free = trace.entering[stage][~trace.protected[stage]]
        kept = len(trace.kept[stage]) - int(trace.protected[stage].sum())
        if len(free) < 2 or not 0 < kept < len(free):
            continue
        ours, truth = scores[free].float().cpu(), saliency[stage].cpu()[free.cpu()]
        # tau is undefined where one side is constant: no agreement on the order then.
        tau = float(kendalltau(ours.numpy(), truth.numpy()).statistic)
        taus.append(0.0 if math.isnan(tau) else tau)
        top = [set(values.argsort(descending=True, stable=True)[:kept].tolist()) for values in (ours, truth)]
        overlaps.append(len(top[0] & top[1]) / kept)
    if not taus:
        return math.nan, math.nan
    return sum(taus) / len(taus), sum(overlaps) / len(overlaps)
