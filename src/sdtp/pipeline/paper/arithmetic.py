"""What the run's schedules make of lengths: arithmetic only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdtp.evaluation import names
from sdtp.pipeline.config import Settings
from sdtp.pipeline.schedules import build_schedule
from sdtp.pruning import flops
from sdtp.pruning.schedule import PruningSchedule


class Schedules:
    """The schedules of a run.

    Args:
        settings: of the run.
        config: the model's.
    """

    def __init__(self, settings: Settings, config: Any) -> None:
        self._settings = settings
        self._config = config

    def _schedule(self, ratio: float) -> PruningSchedule:
        return build_schedule(self._settings.pruning, self._config.num_hidden_layers, ratio)

    def decode_tflop(self, prompt_tokens: int, new_tokens: int, ratio: float) -> float:
        """Arithmetic of decoding after a prompt, in TFLOP; ratio 1.0 is the unpruned model."""
        schedule = None if ratio == 1.0 else self._schedule(ratio)
        return flops.decode(self._config, prompt_tokens, new_tokens, schedule) / 1e12

    def layer_mean(self, method: str, ratio: float, prompts: Sequence[int]) -> float | None:
        """Prompts' tokens, all together, over those that a layer sees of them on average; None without stages."""
        if method == "unpruned":
            return 1.0
        # A tuned schedule is no arithmetic of the settings.
        if method not in (*names.LEARNED, *names.BASELINES) or method == names.TUNED:
            return None
        schedule = self._schedule(ratio)
        if method == "sdtp-half":
            schedule = schedule.at_stages(names.half(schedule.stages))
        layers = self._config.num_hidden_layers
        seen = sum(
            count * float(np.mean(schedule.layer_lengths(tokens, layers))) for tokens, count in Counter(prompts).items()
        )
        return sum(prompts) / seen
