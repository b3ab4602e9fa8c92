"""Aggregation: lists of words, of which the most frequent are asked for."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document
from sdtp.pipeline.ruler.layout import Asking, Draft, Piece, Sheet, ask, exactly, piece, room, size
from sdtp.pipeline.target_settings import RulerSettings

_OPENING = "The words in this list come up more or less often.\n\nList:"
_QUESTION = "Which {count} words come up most often in the list?"
_ANSWER = "The {count} words that come up most often are"
# Words of a text that are worth remembering: no names, no abbreviations, few that hold the grammar together.
_WORD = re.compile(r"(?<![\w'-])[a-z]{5,10}(?![\w'-])")
# Words that come up once, of which some fill the last few tokens.
_TRIED = 100
# Where no choice of them does, as many other lists, each with one word less, leave room for more.
_TRIES = 4

FREQUENT_WORDS = 3
# The fewest times that the most frequent word can come up, so that the third comes up more often than the fourth.
_FEWEST = 18
# Syllables of two letters: made-up words of one length, so that none is part of another.
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
_WORD_SYLLABLES = 3


def vocabulary(documents: Sequence[Document]) -> list[str]:
    """The words of all documents that can stand in a list, each once, sorted."""
    words = {word for document in documents for word in _WORD.findall(document.text)}
    return sorted(words - set(_WORD.findall(f"{_OPENING} {_QUESTION} {_ANSWER}".lower())))


def common_words(sheet: Sheet, settings: RulerSettings, words: Sequence[str]) -> Draft:
    """A few words often and many rarely; the last tokens are filled by words that come up once.

    Args:
        words: as `vocabulary` gives them.

    Raises:
        UserError: too few words for the length.
    """
    order = sheet.rng.sample(words, len(words))
    common = _apart(order, settings.common_words)
    if len(common) < settings.common_words:
        raise UserError(f"suites.ruler.common_words: {settings.common_words} is above {len(common)}, what the text has")
    asking = _asking(sheet, common)
    often = [own for word in common for own in [piece(sheet, word)] * settings.common_repeats]
    others = (piece(sheet, word) for word in order if not any(word in own or own in word for own in common))
    repeats = settings.rare_repeats
    rare = list(islice(others, 1))
    what = f"{settings.common_words} words, {settings.common_repeats} times each, beside another"
    left = room(sheet, asking, size(often) + repeats * size(rare), what) - size(often) - repeats * size(rare)
    for own in others:
        if repeats * len(own[1]) > left:
            break
        rare.append(own)
        left -= repeats * len(own[1])
    else:
        raise UserError(
            f"suites.ruler.lengths: {sheet.length} is too long for task common_words: the text has {len(words)} "
            f"different words to fill it with; raise suites.ruler.rare_repeats ({repeats}) or "
            f"suites.ruler.common_repeats ({settings.common_repeats})"
        )
    once = list(islice(others, _TRIED))
    tries = []
    for fewer in range(min(_TRIES, len(rare))):
        kept = rare[: len(rare) - fewer]
        tries.append([*kept * repeats, *exactly(once, left + repeats * (size(rare) - size(kept)))])
    return _shuffled(sheet, asking, [*often, *max(tries, key=size)])


def frequent_words(sheet: Sheet) -> Draft:
    """Made-up words: that of rank k comes up c / k² times, rounded down.

    The largest c that fits, or a little less where that lets the tokens add up to the length.
    """
    words = _made_up(sheet)
    ranked = [piece(sheet, next(words)) for _ in _counts(_FEWEST)]
    asking = _asking(sheet, [text.strip() for text, _ in ranked[:FREQUENT_WORDS]])
    what = f"{FREQUENT_WORDS} words in a list of {sum(_counts(_FEWEST))}"
    left = room(sheet, asking, _tokens(ranked, _FEWEST), what)
    # No more words than a list of one token a word could hold.
    ranked += [piece(sheet, next(words)) for _ in range(len(ranked), len(_counts(left)))]
    most = _FEWEST - 1 + bisect_right(range(_FEWEST, left + 1), left, key=lambda count: _tokens(ranked, count))
    once = [piece(sheet, next(words)) for _ in range(_TRIED)]
    tries = []
    for often in range(most, max(_FEWEST - 1, most - _TRIES), -1):
        body = [own for count, own in zip(_counts(often), ranked, strict=False) for _ in range(count)]
        tries.append([*body, *exactly(once, left - size(body))])
    return _shuffled(sheet, asking, max(tries, key=size))


def _asking(sheet: Sheet, references: Sequence[str]) -> Asking:
    count = {"count": len(references)}
    return ask(sheet, _OPENING, _QUESTION.format(**count), _ANSWER.format(**count), references)


def _apart(words: Sequence[str], count: int) -> list[str]:
    """The first `count` words of which none is part of another."""
    chosen: list[str] = []
    for word in words:
        if len(chosen) == count:
            break
        if not any(word in other or other in word for other in chosen):
            chosen.append(word)
    return chosen


def _counts(often: int) -> list[int]:
    """How often each word comes up where the first does `often` times."""
    return [often // rank**2 for rank in range(1, math.isqrt(often) + 1)]


def _tokens(ranked: Sequence[Piece], often: int) -> int:
    return sum(count * len(own[1]) for count, own in zip(_counts(often), ranked, strict=False))


def _made_up(sheet: Sheet) -> Iterator[str]:
    used: set[str] = set()
    while True:
        word = "".join(sheet.rng.choices(_SYLLABLES, k=_WORD_SYLLABLES))
        if word not in used:
            used.add(word)
            yield word


def _shuffled(sheet: Sheet, asking: Asking, body: list[Piece]) -> Draft:
    sheet.rng.shuffle(body)
    return Draft(asking, body, [])
