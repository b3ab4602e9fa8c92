"""A folder with a tiny model and its tokenizer, and one with a pruner, as the tools take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdtp import PruningSchedule, TokenPruner, scorers

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)


def save(
    folder: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    scorer: scorers.Scorer | None = None,
) -> list[str]:
    """Writes both under `folder`; the arguments that name them."""
    model = tiny_model(vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    TokenPruner(SCHEDULE, scorer or scorers.HiddenNorm()).save_pretrained(folder / "pruner")
    return ["--model", str(folder / "model"), "--pruner", str(folder / "pruner")]
