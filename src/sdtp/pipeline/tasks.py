"""The two tasks made from a corpus: retrieval of a planted fact, and continuation of a document."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document, running_text
from sdtp.pipeline.facts import Phrasing, ValueType, Vocabulary
from sdtp.pipeline.prompts import decode, encode_after, frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUATION_TOKENS = 32
# Which config key says how many examples a split has.
COUNT_KEYS = {"train": "data.train.examples", "heldout": "data.train.heldout", "test": "data.test.examples"}
_OPENING = "Read the text, then answer the question.\n\nText:"
_QUESTION = "\n\nQuestion: {question}"


@dataclass(frozen=True)
class Example:
    """One row of the dataset: `prompt` is the text before the template, `prompt_ids` what the model is given."""

    id: str
    task: str
    prompt_ids: list[int]
    response_ids: list[int]
    prompt: str
    response: str
    source: str


def retrieval_examples(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    *,
    count: int,
    distractors: int,
    max_tokens: int,
    split: str,
    seed: int,
) -> Iterator[Example]:
    """`count` questions about one of `distractors` + 1 facts of the same form, planted in a document's text.

    Every example is a function of (seed, split, its number). Phrasings and kinds of value take turns, so that each is
    asked equally often; entities, values, the fact asked for and the facts' depths are drawn.

    Raises:
        UserError: `distractors` exceeds the vocabulary, or the facts do not fit into `max_tokens`.
    """
    if distractors > vocabulary.max_distractors:
        raise UserError(
            f"data.distractors: {distractors} exceeds {vocabulary.max_distractors}, the most values there are"
        )
    order = document_order(documents, f"{seed}/{split}/retrieval")
    for number in range(count):
        identifier = f"{split}-retrieval-{number:05d}"
        rng = random.Random(f"{seed}/{identifier}")
        phrasing = vocabulary.phrasings[number % len(vocabulary.phrasings)]
        # Advances once more for every full turn of the phrasings, so that all pairs occur whatever the two counts are.
        turn = number // len(vocabulary.phrasings) + number
        value_type = vocabulary.value_types[turn % len(vocabulary.value_types)]
        text = running_text(documents, order[number % len(order)], rng.random())
        entities = rng.sample(vocabulary.entities, distractors + 1)
        values = rng.sample(value_type.values, distractors + 1)
        yield _retrieval_example(tokenizer, identifier, text, phrasing, value_type, entities, values, max_tokens, rng)


def _retrieval_example(
    tokenizer: PreTrainedTokenizerBase,
    identifier: str,
    text: Iterator[tuple[str, str]],
    phrasing: Phrasing,
    value_type: ValueType,
    entities: Sequence[str],
    values: Sequence[str],
    max_tokens: int,
    rng: random.Random,
) -> Example:
    facts = [
        " " + phrasing.fact.format(kind=value_type.kind, entity=entity, value=value)
        for entity, value in zip(entities, values, strict=True)
    ]
    asked = {"kind": value_type.kind, "entity": entities[0]}
    closing = _QUESTION.format(question=phrasing.question.format(**asked))
    around = frame(
        tokenizer,
        opening=_OPENING,
        closing=closing,
        answer=phrasing.answer.format(**asked),
        chat=tokenizer.chat_template is not None,
    )
    planted = [(fact, encode_after(tokenizer, fact)) for fact in facts]
    rng.shuffle(planted)
    used = len(around) + sum(len(ids) for _, ids in planted)
    if used > max_tokens:
        raise UserError(
            f"data.max_tokens: {max_tokens} is too short for {len(facts)} facts and a question ({used} tokens)"
        )
    filler, sources = cut_passage(tokenizer, text, max_tokens - used)
    gaps = sorted(rng.choices(range(len(filler)), k=len(planted)) if filler else [0] * len(planted))
    pieces = []
    for index in range(max(1, len(filler))):
        while gaps and gaps[0] == index:
            pieces.append(planted.pop())
            gaps.pop(0)
        pieces += filler[index : index + 1]
    return Example(
        id=identifier,
        task="retrieval",
        prompt_ids=around.head + [token for _, ids in pieces for token in ids] + around.tail,
        response_ids=encode_after(tokenizer, " " + values[0]),
        prompt=_OPENING + "".join(piece for piece, _ in pieces) + closing,
        response=" " + values[0],
        source="+".join(sources),
    )


def continuation_examples(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    count: int,
    max_tokens: int,
    split: str,
    seed: int,
) -> Iterator[Example]:
    """`count` passages of documents, with the 32 tokens that follow as the response.

    A completion, not a conversation: no chat template, and a beginning-of-sequence token where the tokenizer adds one.
    """
    around = frame(tokenizer, chat=False)
    order = document_order(documents, f"{seed}/{split}/continuation")
    for number in range(count):
        identifier = f"{split}-continuation-{number:05d}"
        rng = random.Random(f"{seed}/{identifier}")
        text = running_text(documents, order[number % len(order)], rng.random())
        length = max_tokens - len(around)
        passage, sources = cut_passage(tokenizer, text, length + CONTINUATION_TOKENS)
        ids = [token for _, piece in passage for token in piece]
        yield Example(
            id=identifier,
            task="continuation",
            prompt_ids=around.head + ids[:length],
            response_ids=ids[length:],
            prompt=decode(tokenizer, ids[:length]),
            response=decode(tokenizer, ids[length:]),
            source="+".join(sources),
        )


def document_order(documents: Sequence[Document], key: str) -> list[int]:
    """A shuffled order of documents: examples go through it, so none is used twice before every other was once."""
    order = list(range(len(documents)))
    random.Random(key).shuffle(order)
    return order


def cut_passage(
    tokenizer: PreTrainedTokenizerBase, text: Iterator[tuple[str, str]], tokens: int
) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """Sentences, as (text, ids), of exactly `tokens` ids in all, the last one cut; and the documents they are from."""
    pieces: list[tuple[str, list[int]]] = []
    sources: list[str] = []
    while tokens > 0:
        name, sentence = next(text)
        piece = " " + sentence
        ids = encode_after(tokenizer, piece)
        if len(ids) > tokens:
            ids = ids[:tokens]
            piece = decode(tokenizer, ids)
        pieces.append((piece, ids))
        tokens -= len(ids)
        if name not in sources:
            sources.append(name)
    return pieces, sources
