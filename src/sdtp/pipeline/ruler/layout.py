"""Prompts of an exact number of tokens, put together from pieces of text that keep their own tokens."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from sdtp.errors import UserError
from sdtp.evaluation.references import found
from sdtp.pipeline.prompts import Frame, encode_after, frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A prompt has at least so much of the corpus: facts without a text around them are no long context.
MIN_TEXT_TOKENS = 32
# A corpus in which so many sentences in a row contain an answer cannot hide it.
_MOST_SKIPPED = 10_000

# Text that begins with a space, and its ids after other text.
Piece = tuple[str, list[int]]


@dataclass(frozen=True)
class Sheet:
    """What one example is written on.

    Attributes:
        tokenizer: the model's.
        task, length: which task, in how many prompt tokens.
        number: of the example.
        rng: of all its choices.
        text: (document, sentence) pairs without end, from where this example begins in the corpus.
    """

    tokenizer: PreTrainedTokenizerBase
    task: str
    length: int
    number: int
    rng: random.Random
    text: Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Asking:
    """What surrounds the body of a prompt, and what counts as an answer."""

    opening: str
    closing: str
    references: tuple[str, ...]
    frame: Frame


@dataclass(frozen=True)
class Draft:
    """A finished example: the pieces between `asking`'s ends, the documents they are from, a single fact's depth."""

    asking: Asking
    body: list[Piece]
    sources: list[str]
    depth: float | None = None


def ask(sheet: Sheet, opening: str, question: str, answer: str, references: Sequence[str]) -> Asking:
    """The ends of a prompt: `opening` before the body, `question` after it, and `answer`, which begins the reply."""
    closing = f"\n\nQuestion: {question}"
    chat = sheet.tokenizer.chat_template is not None
    around = frame(sheet.tokenizer, opening=opening, closing=closing, answer=answer, chat=chat)
    return Asking(opening, closing, tuple(references), around)


def piece(sheet: Sheet, text: str) -> Piece:
    """`text` after a space."""
    return " " + text, encode_after(sheet.tokenizer, " " + text)


def size(pieces: Sequence[Piece]) -> int:
    """Tokens of all pieces."""
    return sum(len(ids) for _, ids in pieces)


def room(sheet: Sheet, asking: Asking, needed: int, what: str) -> int:
    """Tokens left for the body.

    Args:
        needed: the fewest that will do.
        what: they are needed for.

    Raises:
        UserError: there are fewer.
    """
    left = sheet.length - len(asking.frame)
    if left < needed:
        raise UserError(
            f"suites.ruler.lengths: {sheet.length} is too short for task {sheet.task}: {what}, question and template "
            f"need at least {needed + len(asking.frame)} tokens"
        )
    return left


def without(text: Iterator[tuple[str, str]], forbidden: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The pairs of `text` whose sentence contains none of `forbidden`, letter case aside.

    Raises:
        UserError: thousands in a row contain one.
    """
    skipped = 0
    for name, sentence in text:
        if not any(found(sentence, forbidden)):
            skipped = 0
            yield name, sentence
            continue
        skipped += 1
        if skipped == _MOST_SKIPPED:
            raise UserError(
                f"{_MOST_SKIPPED:,} sentences in a row, from {name!r} at last, contain one of {list(forbidden)[:5]}: a "
                "text without the answers is needed"
            )


def plant(pieces: Sequence[Piece], facts: Sequence[Piece], depths: Sequence[float]) -> list[Piece]:
    """`pieces` with facts between them, each at the boundary nearest to its depth in tokens.

    Args:
        pieces: the text, at least one piece.
        facts: what to plant, in the order of the text.
        depths: of the facts, ascending: 0 before all pieces, 1 after them.
    """
    ends = [0, *accumulate(len(ids) for _, ids in pieces)]
    planted: list[list[Piece]] = [[] for _ in ends]
    for fact, depth in zip(facts, depths, strict=True):
        place = depth * ends[-1]
        after = min(bisect_left(ends, place), len(ends) - 1)
        before = max(0, after - 1)
        planted[before if place - ends[before] <= ends[after] - place else after].append(fact)
    whole = list(planted[0])
    for own, following in zip(pieces, planted[1:], strict=True):
        whole += [own, *following]
    return whole


def exactly(candidates: Sequence[Piece], tokens: int) -> list[Piece]:
    """Some of the candidates, with `tokens` ids in all, or with as few less as can be."""
    # Sums up to `tokens` that some of the candidates so far have, each with which; those found first stay.
    sums: dict[int, list[Piece]] = {0: []}
    for candidate in candidates:
        if tokens in sums:
            break
        for total, chosen in list(sums.items()):
            if total + len(candidate[1]) <= tokens:
                sums.setdefault(total + len(candidate[1]), [*chosen, candidate])
    return sums[max(sums)]
