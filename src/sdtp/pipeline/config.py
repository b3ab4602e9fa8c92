"""A typed view of the settings a step was given; the config schema has the defaults, this has none.

A rule passes a step exactly the config keys the step uses, so that a change of any other key reruns nothing. The blocks
below therefore hold *some* of their keys: reading one that was not passed raises AttributeError with its name, which
means that the rule and the step disagree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Self

from sdtp.pipeline.block import Block, Source
from sdtp.pipeline.target_settings import (
    HarnessSettings,
    PaperSettings,
    PeersSettings,
    ServingSettings,
    SuitesSettings,
    SweepSettings,
)


@dataclass(frozen=True, repr=False)
class ModelSettings(Block):
    """The causal language model and how it is loaded (see config/README.md for every key here and below)."""

    source: Source
    dtype: str
    attention: str
    trust_remote_code: bool


@dataclass(frozen=True, repr=False)
class TrainData(Block):
    """Examples the pruner learns from, and those held out to watch it learn."""

    source: Source
    examples: int
    heldout: int


@dataclass(frozen=True, repr=False)
class TestData(Block):
    """Examples, per task, that quality is measured on."""

    source: Source
    examples: int


@dataclass(frozen=True, repr=False)
class DataSettings(Block):
    """What the examples are made of; `max_tokens` counts prompt tokens, chat template included."""

    max_tokens: int
    train: TrainData
    test: TestData
    malformed: str
    distractors: int


@dataclass(frozen=True, repr=False)
class PruningSettings(Block):
    """Stages before layers `start`, `start + step`, ...; keep ratios are fractions kept per stage."""

    start: int
    step: int
    keep_ratios: tuple[float, ...]
    sinks: int
    local: float
    min_local: int


@dataclass(frozen=True, repr=False)
class SaliencySettings(Block):
    """Stage 1: gradient x input of the frozen model."""

    shards: int
    reduction: str
    target: str
    batch_tokens: int
    gradient_checkpointing: bool


@dataclass(frozen=True, repr=False)
class LossWeights(Block):
    """Weights of the training losses; zero leaves a loss out."""

    ce: float
    kl: float
    mse: float
    rank: float


@dataclass(frozen=True, repr=False)
class TrainingSettings(Block):
    """Stage 2: fitting the scorers on the frozen model."""

    gpus: int
    keep_ratio: float
    label_epochs: int
    label_examples: int
    steps: int
    batch_size: int
    learning_rate: float
    width: int
    position: bool
    question_rank: int
    neighbours: int
    recency: float
    temperature: float
    sampler: str
    weights: LossWeights
    evaluate_every: int
    checkpoint_every: int
    patience: int
    autocast: bool
    gradient_checkpointing: bool
    shard_model: bool


@dataclass(frozen=True, repr=False)
class GenerationSettings(Block):
    """Pruned generations shown in the report."""

    examples: int
    max_new_tokens: int


@dataclass(frozen=True, repr=False)
class BenchmarkSettings(Block):
    """Shapes that are timed, and how often."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    repeats: int
    warmup: int


@dataclass(frozen=True, repr=False)
class EvaluationSettings(Block):
    """Methods compared on quality; `seeds` are those of the random choices."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    batch_tokens: int


@dataclass(frozen=True, repr=False)
class Settings(Block):
    """Everything a step may be given."""

    run: str
    seed: int
    model: ModelSettings
    data: DataSettings
    pruning: PruningSettings
    saliency: SaliencySettings
    training: TrainingSettings
    generation: GenerationSettings
    benchmark: BenchmarkSettings
    evaluation: EvaluationSettings
    sweep: SweepSettings
    peers: PeersSettings
    suites: SuitesSettings
    harness: HarnessSettings
    serving: ServingSettings
    paper: PaperSettings

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the JSON object a rule passes as `--settings`. Raises ValueError for bad JSON or an unknown key."""
        return cls.from_mapping(json.loads(text))
