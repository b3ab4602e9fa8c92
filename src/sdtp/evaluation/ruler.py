"""RULER-style tasks: predictions of a model under a pruner, and scores that are recomputable from them alone.

A score is the share of references that stand in the prediction, in percent; for tasks of `PART_MATCH`, whose references
are different ways to write one answer, 100 where any does (Hsieh et al. 2024, arXiv 2404.06654, section 4 and their
published code's two measures).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypedDict

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdtp.evaluation.generation import greedy
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.retrieval import found
from sdtp.evaluation.stats import wilson_interval
from sdtp.pruning.pruner import TokenPruner

# Tasks in which one reference is enough.
PART_MATCH = frozenset({"qa"})


@dataclasses.dataclass(frozen=True)
class RulerExample:
    """One prompt and what it asks for.

    Attributes:
        id: unique among all tasks and lengths.
        task: name of the task.
        length: prompt tokens that were asked for; `prompt_ids` has as many, seldom a few less.
        depth: where the single fact stands, 0 before the text and 1 after it; None for tasks that draw it.
        prompt_ids: what the model is given.
        prompt: the message before template and reply.
        references: what has to be in the prediction.
        max_new_tokens: most tokens of a prediction.
        chat: whether the model's chat template is around the message.
        source: documents that the text is from.
    """

    id: str
    task: str
    length: int
    depth: float | None
    prompt_ids: list[int]
    prompt: str
    references: list[str]
    max_new_tokens: int
    chat: bool
    source: str


class PredictionRow(TypedDict):
    """What came of an example; `kept_tokens` of its prompt are in the last layer's cache, per head under a peer."""

    id: str
    task: str
    length: int
    depth: float | None
    chat: bool
    prompt_tokens: int
    kept_tokens: int
    prediction: str
    references: list[str]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pruner: TokenPruner | Peer | None,
    examples: Iterable[RulerExample],
    batch_size: int,
) -> Iterator[PredictionRow]:
    """Greedy replies to the examples, in their order.

    Args:
        model: eval mode, unhooked.
        pruner: what the model goes under, a peer with a batch size of 1; None for the unpruned model.
        examples: neighbours with prompts of one length share a batch, so that nothing is padded.
        batch_size: most prompts generated from together, >= 1.
    """
    for _, equal in groupby(examples, key=lambda example: len(example.prompt_ids)):
        while batch := [example for _, example in zip(range(batch_size), equal, strict=False)]:
            yield from _predict_batch(model, tokenizer, pruner, batch)


def _predict_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pruner: TokenPruner | Peer | None,
    batch: Sequence[RulerExample],
) -> Iterator[PredictionRow]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts = [example.prompt_ids for example in batch]
    most = max(example.max_new_tokens for example in batch)
    for example, reply in zip(batch, greedy(model, pruner, prompts, most, pad), strict=True):
        # Greedy: what comes after an example's own limit changes nothing before it.
        tokens = reply.ids[: example.max_new_tokens]
        yield {
            "id": example.id,
            "task": example.task,
            "length": example.length,
            "depth": example.depth,
            "chat": example.chat,
            "prompt_tokens": len(example.prompt_ids),
            "kept_tokens": reply.kept_tokens,
            "prediction": str(tokenizer.decode(tokens, skip_special_tokens=True)),
            "references": example.references,
        }


def score(task: str, prediction: str, references: Sequence[str]) -> float:
    """Percent of the references that stand in the prediction; for a task of `PART_MATCH` 100 where one does.

    Raises:
        ValueError: no references, or a blank one.
    """
    if not references:
        raise ValueError(f"task {task}: no references; at least one is needed")
    hits = found(prediction, references)
    return 100.0 * (any(hits) if task in PART_MATCH else sum(hits) / len(hits))


@dataclasses.dataclass(frozen=True)
class Score:
    """The mean score of a group of predictions.

    Attributes:
        group: values of the columns that the predictions were grouped by.
        value: mean score in percent.
        ci_low, ci_high: its 95% Wilson interval in percent, a little too wide where an example has several references.
        n: predictions.
        prompt_tokens, kept_tokens: means.
    """

    group: dict[str, Any]
    value: float
    ci_low: float
    ci_high: float
    n: int
    prompt_tokens: float
    kept_tokens: float


def scores(rows: Iterable[Mapping[str, Any]], by: Sequence[str] = ("task", "length")) -> list[Score]:
    """Scores of groups of predictions, groups in the order in which they come up.

    Args:
        rows: as `predict` gives them, or as read back from JSON lines; they may have more columns, a method's name say.
        by: columns that tell groups apart.

    Raises:
        ValueError: a row without one of the columns, or an example twice in one group.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        missing = [name for name in by if name not in row]
        if missing:
            raise ValueError(f"prediction {row['id']} has no {missing[0]!r}, which scores are to be grouped by")
        key = tuple(row[name] for name in by)
        if row["id"] in groups.setdefault(key, {}):
            raise ValueError(f"example {row['id']} stands twice in the group {dict(zip(by, key, strict=True))}")
        groups[key][row["id"]] = row
    return [_mean(dict(zip(by, key, strict=True)), list(group.values())) for key, group in groups.items()]


def _mean(group: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> Score:
    shares = [score(row["task"], row["prediction"], row["references"]) / 100 for row in rows]
    low, high = wilson_interval(shares)
    return Score(
        group=group,
        value=100 * math.fsum(shares) / len(shares),
        ci_low=100 * low,
        ci_high=100 * high,
        n=len(rows),
        prompt_tokens=math.fsum(row["prompt_tokens"] for row in rows) / len(rows),
        kept_tokens=math.fsum(row["kept_tokens"] for row in rows) / len(rows),
    )


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Scores of a single fact by where it stands and how long the prompt is.

    Attributes:
        depths, lengths: ascending.
        values: [depths, lengths], mean score in percent.
        n: fewest predictions of a cell.
    """

    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    values: np.ndarray
    n: int


def heat_map(rows: Iterable[Mapping[str, Any]]) -> HeatMap:
    """The heat map of one method's predictions; those of tasks that draw their depths are left out.

    Raises:
        ValueError: no prediction has a depth, or a depth was not asked at every length.
    """
    cells = {
        (cell.group["depth"], cell.group["length"]): cell
        for cell in scores((row for row in rows if row["depth"] is not None), ("depth", "length"))
    }
    if not cells:
        raise ValueError("no prediction has a depth: a heat map needs those of the task 'single'")
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    missing = [(depth, length) for depth in depths for length in lengths if (depth, length) not in cells]
    if missing:
        depth, length = missing[0]
        raise ValueError(f"no prediction at depth {depth} and length {length}: each depth is needed at each length")
    values = np.array([[cells[depth, length].value for length in lengths] for depth in depths])
    return HeatMap(tuple(depths), tuple(lengths), values, min(cell.n for cell in cells.values()))
