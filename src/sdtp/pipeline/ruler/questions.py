"""Question answering: the passage with the answer among others of its kind, and passages of the corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.evaluation.references import found
from sdtp.pipeline.block import Source
from sdtp.pipeline.rows import read_rows
from sdtp.pipeline.ruler.layout import (
    MIN_TEXT_TOKENS,
    Draft,
    Sheet,
    ask,
    piece,
    room,
    size,
    without,
)
from sdtp.pipeline.ruler.profiles import MOST_PEOPLE, Passage, profiles
from sdtp.pipeline.target_settings import RulerSettings
from sdtp.pipeline.tasks import cut_passage

_OPENING = "One of these passages answers the question at the end.\n\nPassages:"
_BEGINNING = "\n\nPassage: "
# Sentences of the corpus that make a passage.
_SENTENCES = 4
_REPLY = "The answer is"
_FIELDS = ("context", "question", "answers")


def read_passages(path: str, key: str) -> list[Passage]:
    """Passages with questions from a JSON-lines file: fields `context`, `question`, `answers`.

    `answers` is a list of texts, or, as in SQuAD, an object that has such a list as `text`. Rows without an answer (of
    SQuAD 2) are left out.

    Args:
        path: of the file.
        key: its config key, for messages.

    Raises:
        UserError: no such file, a field that is missing, blank or of another type, no rows.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: no file {path!r}; a JSON-lines file of passages is needed")
    passages = []
    for row in read_rows(Source("jsonl", path, None, None), key).rows:
        if row.not_utf8:
            raise UserError(f"{row.where}: {row.not_utf8}")
        passage = _passage(row.fields, row.where)
        if passage.answers:
            passages.append(passage)
    if not passages:
        raise UserError(f"{key}: {path} has no row with an answer; at least one is needed")
    return passages


def _passage(fields: Mapping[str, Any], where: str) -> Passage:
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise UserError(f"{where}: field {missing[0]!r} is missing; a row needs {', '.join(_FIELDS)}")
    for name in ("context", "question"):
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise UserError(f"{where}: field {name!r} is {fields[name]!r}; text is needed")
    answers = fields["answers"]
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UserError(f"{where}: field 'answers' is {fields['answers']!r}; a list of texts is needed")
    unique = tuple(dict.fromkeys(answer.strip() for answer in answers))
    return Passage(" ".join(fields["context"].split()), fields["question"].strip(), unique, _REPLY)


def qa(sheet: Sheet, settings: RulerSettings, pool: Sequence[Passage] | None) -> Draft:
    """A question about one passage, at a drawn place among as many others as fit, up to `settings.distractors`.

    What they leave is filled by the corpus, in passages of a few sentences. None but the one has any of the answers.

    Args:
        pool: passages, whose questions are asked in turn; None for profiles of invented people.
    """
    if pool is None:
        pool = profiles(sheet.rng, min(settings.distractors, MOST_PEOPLE - 1))
        asked, others = pool[0], iter(pool[1:])
    else:
        asked, others = pool[sheet.number % len(pool)], _others(sheet, pool)
    asking = ask(sheet, _OPENING, asked.question, asked.reply, asked.answers)
    planted = [piece(sheet, _BEGINNING + asked.text)]
    what = f"the passage with the answer, {MIN_TEXT_TOKENS} tokens of others"
    left = room(sheet, asking, size(planted) + MIN_TEXT_TOKENS, what) - size(planted)
    for other in others:
        own = piece(sheet, _BEGINNING + other.text)
        if len(planted) > settings.distractors or len(own[1]) > left - MIN_TEXT_TOKENS:
            break
        planted.append(own)
        left -= len(own[1])
    text, sources = cut_passage(sheet.tokenizer, _begun(without(sheet.text, asked.answers)), left)
    sheet.rng.shuffle(planted)
    starts = [index for index, (words, _) in enumerate(text) if words.startswith(" " + _BEGINNING)]
    places = sorted(sheet.rng.choices([*starts, len(text)], k=len(planted)))
    for place, own in reversed(list(zip(places, planted, strict=True))):
        text.insert(place, own)
    return Draft(asking, text, sources)


def _others(sheet: Sheet, pool: Sequence[Passage]) -> Iterator[Passage]:
    """In random order the passages that have none of the answers of the one whose turn it is, each text once."""
    asked = pool[sheet.number % len(pool)]
    used = {asked.text}
    for other in sheet.rng.sample(pool, len(pool)):
        if other.text not in used and not any(found(other.text, asked.answers)):
            used.add(other.text)
            yield other


def _begun(text: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """`text` with the beginning of a passage before every few sentences."""
    for number, (name, sentence) in enumerate(text):
        yield name, sentence if number % _SENTENCES else _BEGINNING + sentence
