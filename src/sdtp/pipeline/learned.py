"""The scorer that the settings ask for, with the weights training starts from."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sdtp.pipeline.config import TrainingSettings
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned


def build_scorer(training: TrainingSettings, model: PreTrainedModel, schedule: PruningSchedule, seed: int) -> Learned:
    """The one place where settings become a scorer.

    Args:
        training: settings.
        model: that the scorer is for.
        schedule: whose stages it scores.
        seed: of its first weights, which are a function of it and of the shapes alone.

    Returns:
        An untrained scorer on the CPU, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Learned(
            model.config.hidden_size,
            schedule.stages,
            width=training.width,
            position=training.position,
            question_rank=training.question_rank,
            neighbours=training.neighbours,
            recency=training.recency,
        )
