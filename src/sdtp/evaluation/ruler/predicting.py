"""Predictions of a model, pruned or not, for RULER-style examples: greedy, prompts of one length together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdtp.evaluation.generation import greedy
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.ruler.tasks import RulerExample
from sdtp.pruning.pruner import TokenPruner


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
