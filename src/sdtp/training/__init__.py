"""How a scorer comes to be: saliency of the frozen model, and fitting the scorers to it."""

from sdtp.training.losses import pairwise_ranking

__all__ = ["pairwise_ranking"]
