"""A typed view of the settings a step was given; the config schema has the defaults, this has none.

A rule passes a step exactly the config keys the step uses, so that a change of any other key reruns nothing. The blocks
below therefore hold *some* of their keys: reading one that was not passed raises AttributeError with its name, which
means that the rule and the step disagree.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


class Block:
    """Builds a frozen dataclass from the keys that were passed, which may be fewer than its fields."""

    _path: str

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Takes JSON values by field name; lists become tuples, objects the block their field names.

        Args:
            values: the settings, nested as in the config.
            path: dotted name of this block, for messages.

        Raises:
            ValueError: a key the block does not have.
        """
        fields = typing.get_type_hints(cls)
        block = object.__new__(cls)
        object.__setattr__(block, "_path", path)
        for key, value in values.items():
            name = f"{path}.{key}" if path else key
            if key not in fields or key.startswith("_"):
                accepted = ", ".join(field for field in fields if not field.startswith("_"))
                raise ValueError(f"setting {name} is not known; {path or 'settings'} has {accepted}")
            # A block that may be null is written `Source | None`.
            kinds = typing.get_args(fields[key]) or (fields[key],)
            kind = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Block)), None)
            if kind is not None and value is not None:
                value = kind.from_mapping(value, name)
            elif isinstance(value, list):
                value = tuple(value)
            object.__setattr__(block, key, value)
        return block

    def __repr__(self) -> str:
        passed = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({passed})"

    def __getattr__(self, key: str) -> Any:
        # Reached only for what was not passed; copy and pickle probe for names with underscores.
        if key.startswith("_"):
            raise AttributeError(key)
        raise AttributeError(f"setting {f'{self._path}.{key}' if self._path else key} was not passed to this step")


@dataclass(frozen=True, repr=False)
class Source(Block):
    """Where a model or a text comes from.

    Attributes:
        kind: `hub`, `local`, `package` or `jsonl`.
        ref: hub id, folder, file, or `distribution[/file]` of a Python package.
        revision: hub commit, branch or tag; None for the others.
        sha256: expected checksum of the file, None where none is pinned.
    """

    kind: str
    ref: str
    revision: str | None
    sha256: str | None


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
class RulerSettings(Block):
    """RULER-style tasks: how many of them, over which text, and how hard each is.

    Attributes:
        source: the text that facts are planted in.
        tasks: names, see `sdtp.pipeline.ruler.settings.TASKS`.
        lengths: prompt tokens.
        examples: of each task at each length.
        depths: where `single` plants its fact, in turn: 0 before the text, 1 after it.
        keys: facts of `multi_key`, of which one is asked for (RULER: 4).
        values: facts of `multi_value`, all of one key (RULER: 4).
        queries: facts of `multi_query`, all asked for (RULER: 4).
        chains: chains of `variables`, of which one is asked for (RULER: 1).
        hops: assignments of a variable to the next in each of them, so that it has one name more (RULER: 4).
        common_words: words that `common_words` asks for (RULER: 10).
        common_repeats: how often each of them stands in the list (RULER: 30).
        rare_repeats: how often each other word does (RULER: 3).
        passages: JSON-lines file of what `qa` asks about; None for invented people.
        distractors: most passages of `qa` besides the one with the answer; as many as fit are used.
    """

    source: Source
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    examples: int
    depths: tuple[float, ...]
    keys: int
    values: int
    queries: int
    chains: int
    hops: int
    common_words: int
    common_repeats: int
    rare_repeats: int
    passages: str | None
    distractors: int


@dataclass(frozen=True, repr=False)
class LongBenchSettings(Block):
    """LongBench: where from, and how much of it.

    Attributes:
        source: the official data; None where LongBench is not run.
        templates: folder of the official templates; None for the project's own.
        tasks: names, see `sdtp.evaluation.longbench.tasks.TASKS`.
        max_tokens: longest prompt, chat template included; what is longer loses its middle.
        examples: most of a task; None for all.
    """

    source: Source | None
    templates: str | None
    tasks: tuple[str, ...]
    max_tokens: int
    examples: int | None


@dataclass(frozen=True, repr=False)
class SuitesSettings(Block):
    """Suites of long-context tasks with generated answers; methods beside the unpruned model, each at each ratio."""

    methods: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    batch_tokens: int
    ruler: RulerSettings
    longbench: LongBenchSettings


@dataclass(frozen=True, repr=False)
class PeersSettings(Block):
    """What one would use instead of learned pruning, and the lengths at which all methods are timed side by side."""

    methods: tuple[str, ...]
    layer: int | None
    cache_keep: float
    prompt_tokens: tuple[int, ...]
    kvpress: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class SweepSettings(Block):
    """Where one stage stands, and how many of the run's stages there are; `examples` are the first of each task."""

    layers: tuple[int, ...]
    layer_ratios: tuple[float, ...]
    counts: tuple[int, ...]
    count_ratios: tuple[float, ...]
    examples: int


@dataclass(frozen=True, repr=False)
class LocalTaskSettings(Block):
    """The project's own multiple-choice tasks: the text they ask about, how often, and the words of a passage."""

    source: Source
    questions: int
    passage_words: int


@dataclass(frozen=True, repr=False)
class HarnessSettings(Block):
    """Multiple-choice tasks of lm-evaluation-harness; methods beside the unpruned model, each at each ratio.

    Attributes:
        tasks: names, the project's own (`sdtp.pipeline.multiple_choice.LOCAL_TASKS`), lm-eval's, or those of `include`.
        include: folder with YAML files of further tasks; None where there are none.
        fewshot: examples before each question.
        limit: most questions of a task; None for all.
        batch_size: contexts that run together.
        local: the project's own tasks.
    """

    methods: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    tasks: tuple[str, ...]
    include: str | None
    fewshot: int
    limit: int | None
    batch_size: int
    local: LocalTaskSettings


@dataclass(frozen=True, repr=False)
class PaperSettings(Block):
    """The paper's tables and figures; `llmlingua` names LLMLingua-2's weights, None leaves it out."""

    llmlingua: str | None


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
    paper: PaperSettings

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the JSON object a rule passes as `--settings`. Raises ValueError for bad JSON or an unknown key."""
        return cls.from_mapping(json.loads(text))
