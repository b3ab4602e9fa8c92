"""Settings of what is asked for beside the run: suites, the harness, sweeps, peers, the paper."""

from __future__ import annotations

from dataclasses import dataclass

from sdtp.pipeline.block import Block, Source


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
class ServingSettings(Block):
    """What a server asks: how fast many requests are answered on each placement, and the longest prompt that fits.

    Attributes:
        placements: names, see `sdtp.pipeline.placements.Placement`.
        prompt_tokens: of each request.
        new_tokens: generated after each.
        batch_sizes: requests that run together.
        requests: answered in one pass of each arm.
        memory_limit: bytes that a prompt fits into; None for all that the GPU has, on the CPU three times the weights.
        length_step: the prompts tried are multiples of it, and the longest that the model has positions for.
    """

    placements: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    requests: int
    memory_limit: int | None
    length_step: int
