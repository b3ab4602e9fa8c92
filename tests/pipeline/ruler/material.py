"""A corpus of made-up sentences and settings that fit into short prompts."""

from __future__ import annotations

import random
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdtp.evaluation.ruler.tasks import RulerExample
from sdtp.pipeline.corpus import Document
from sdtp.pipeline.ruler.examples import ruler_examples
from sdtp.pipeline.target_settings import RulerSettings

SETTINGS: dict[str, Any] = {
    "depths": (0.0, 0.25, 0.5, 0.75, 1.0),
    "keys": 4,
    "values": 3,
    "queries": 3,
    "chains": 2,
    "hops": 3,
    "common_words": 3,
    "common_repeats": 6,
    "rare_repeats": 2,
    "distractors": 3,
}


def settings(**changes: Any) -> RulerSettings:
    return RulerSettings.from_mapping({**SETTINGS, **changes})


def documents(count: int = 5, length: int = 60) -> list[Document]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiklmnoprstu", k=rng.randint(4, 8))) for _ in range(600)]
    return [
        Document(f"{year}-x", str(year), " ".join(f"The {' '.join(rng.choices(words, k=6))}." for _ in range(length)))
        for year in range(count)
    ]


def examples(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    length: int = 900,
    count: int = 4,
    seed: int = 0,
    pool: Any = None,
    text: list[Document] | None = None,
    **changes: Any,
) -> list[RulerExample]:
    return list(
        ruler_examples(
            tokenizer,
            documents() if text is None else text,
            settings(**changes),
            task=task,
            length=length,
            count=count,
            seed=seed,
            passages=pool,
        )
    )
