"""Multiple-choice questions over the documents of a corpus: what lm-evaluation-harness is given where there is no hub.

Every question has a passage before it, several choices of several tokens that differ in nothing but what the passage
decides, and one right answer that nobody had to write: it is what the document itself says. Choices that only differ
in how well they fit any text would be told apart without the passage, and pruning it could not hurt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document, sentences
from sdtp.pipeline.facts import TEST
from sdtp.pipeline.tasks import document_order

# Names of the tasks in lm-eval, each with what its question is.
LOCAL_TASKS = {
    "sdtp_quote": "how a sentence of the passage goes on, among the ends of its other sentences",
    "sdtp_fact": "which of the facts planted in the passage is asked for",
    "sdtp_next": "which sentence follows the passage, among sentences from elsewhere in the document",
    "sdtp_name": "which name stands in the next sentence: one of the passage, or one from elsewhere in the document",
    "sdtp_number": "the same for numbers and years",
}
CHOICES = 4
# Few-shot examples that lm-eval draws from. They show the form, so that short ones will do: they have half the choices
# and a fraction of the words.
SHOTS = 16
SHOT_CHOICES = 2
SHOT_WORDS = 15
# A document in this many is kept for them, and no question is about it.
_SHOT_DOCUMENTS = 5
# Words of a sentence that can be asked about: fewer say too little, more are lists.
_SENTENCE_WORDS = (8, 40)
# Words that follow a name or a number in its choice: enough to say whether it fits, the same in every choice.
_FOLLOWING_WORDS = 4
# A passage is looked for at so many places before a corpus is called unfit.
_ATTEMPTS = 10_000
# The word before, and capitalised words in a row, inside a sentence: "the" and "Rio Grande", "of" and "Ghent".
_NAME = re.compile(r"\b([a-z]+) ([A-Z][a-z]+(?: (?:of (?:the )?)?[A-Z][a-z]+)*)")
_NUMBER = re.compile(r"(?<![\d.,$-])()(\d[\d,]*\d)(?![\d.,]*\d|[-/])")
_EMBLEM = "emblem"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: all that stands before a choice, without white space at its ends.
        choices: what may follow after a space; the first characters of each are no white space.
        answer: index of the right one.
        source: name of the document.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int
    source: str


@dataclass(frozen=True)
class _Place:
    """A passage in its document: sentences `begin` to `end` (excluded) of `lines`."""

    document: str
    lines: Sequence[str]
    begin: int
    end: int

    @property
    def passage(self) -> str:
        return " ".join(self.lines[self.begin : self.end])


# A context, the right choice and wrong ones; None where the place does not have them.
_Draft = tuple[str, str, list[str]] | None


def questions(
    documents: Sequence[Document], task: str, split: str, *, count: int, words: int, seed: int
) -> Iterator[Question]:
    """`count` questions of one task.

    They are a function of the documents, (seed, task, split) and `words`, and a smaller set is the beginning of a
    larger one. No two have the same context; few-shot examples are made of other documents than the questions.

    Args:
        documents: at least two with text; not such as the pruner was trained on.
        task: a key of `LOCAL_TASKS`.
        split: `test`, or `train` for few-shot examples, which have short passages.
        count: of questions.
        words: least words of a test question's passage; it ends with the sentence that reaches them.
        seed: of every choice.

    Raises:
        UserError: text that such questions cannot be made of.
    """
    draft: Callable[[_Place, int, random.Random], _Draft] = {
        "sdtp_quote": _quote,
        "sdtp_fact": _fact,
        "sdtp_next": _next,
        "sdtp_name": _name,
        "sdtp_number": _number,
    }[task]
    shots, choices = split == "train", SHOT_CHOICES if split == "train" else CHOICES
    length = min(words, SHOT_WORDS) if shots else words
    # In one order for all tasks and seeds: what is kept for the few-shot examples is kept everywhere.
    order = document_order(documents, "multiple-choice")
    kept = max(1, len(order) // _SHOT_DOCUMENTS)
    own = [documents[index] for index in (order[:kept] if shots else order[kept:])]
    names, lines = [document.name for document in own], [sentences(document) for document in own]
    contexts: set[str] = set()
    for number in range(count):
        identifier = f"{task}-{split}-{number:05d}"
        rng = random.Random(f"{seed}/{identifier}")
        for place in _places(names, lines, length, rng):
            found = draft(place, choices - 1, rng)
            if found is not None and found[0] not in contexts:
                break
        else:
            raise UserError(
                f"harness.tasks: {task} cannot be made of {len(documents)} documents: no further passage of {length} "
                f"words with {choices} choices was found after {number} questions, of {_ATTEMPTS:,} tried"
            )
        context, right, wrong = found
        contexts.add(context)
        answer = rng.randrange(len(wrong) + 1)
        yield Question(identifier, context, (*wrong[:answer], right, *wrong[answer:]), answer, place.document)


def _places(names: Sequence[str], lines: Sequence[Sequence[str]], words: int, rng: random.Random) -> Iterator[_Place]:
    """Passages of at least `words` words that at least one sentence follows, drawn anywhere, up to `_ATTEMPTS`."""
    if not lines:
        return
    for _ in range(_ATTEMPTS):
        index = rng.randrange(len(lines))
        own = lines[index]
        begin = end = rng.randrange(len(own)) if own else 0
        length = 0
        while end < len(own) - 1 and length < words:
            length += len(own[end].split())
            end += 1
        if length >= words:
            yield _Place(names[index], own, begin, end)


def _plain(sentence: str) -> bool:
    low, high = _SENTENCE_WORDS
    return low <= len(sentence.split()) <= high


def _alike(candidates: Sequence[str], right: str, count: int) -> list[str] | None:
    """The `count` candidates nearest in length to the right choice: a longer choice is less likely whatever it says."""
    others = [candidate for candidate in dict.fromkeys(candidates) if candidate != right]
    others.sort(key=lambda candidate: abs(len(candidate) - len(right)))
    return others[:count] if len(others) >= count else None


def _quote(place: _Place, wrong: int, rng: random.Random) -> _Draft:
    halves = []
    for sentence in place.lines[place.begin : place.end]:
        if _plain(sentence):
            own = sentence.split()
            halves.append((" ".join(own[: len(own) // 2]), " ".join(own[len(own) // 2 :])))
    if not halves:
        return None
    first, right = rng.choice(halves)
    others = _alike([second for _, second in halves], right, wrong)
    return None if others is None else (f"Text: {place.passage}\nQuote: {first}", right, others)


def _fact(place: _Place, wrong: int, rng: random.Random) -> _Draft:
    phrasing = rng.choice(TEST.phrasings)
    colours, animals = (
        next(kind.values for kind in TEST.value_types if kind.kind == name) for name in ("colour", "animal")
    )
    entities = rng.sample(TEST.entities, wrong + 1)
    pairs = zip(rng.sample(colours, wrong + 1), rng.sample(animals, wrong + 1), strict=True)
    values = [f"the {colour} {animal}" for colour, animal in pairs]
    facts = [
        phrasing.fact.format(kind=_EMBLEM, entity=entity, value=value)
        for entity, value in zip(entities, values, strict=True)
    ]
    lines = list(place.lines[place.begin : place.end])
    for fact in rng.sample(facts, len(facts)):
        lines.insert(rng.randrange(len(lines) + 1), fact)
    asked = phrasing.question.format(kind=_EMBLEM)
    answer = phrasing.answer.format(kind=_EMBLEM, entity=entities[0])
    return f"Text: {' '.join(lines)}\nQuestion: {asked}\nAnswer: {answer}", values[0], values[1:]


def _next(place: _Place, wrong: int, rng: random.Random) -> _Draft:
    right = place.lines[place.end]
    if not _plain(right):
        return None
    elsewhere = [*place.lines[: place.begin], *place.lines[place.end + 1 :]]
    others = _alike([line for line in elsewhere if _plain(line)], right, wrong)
    return None if others is None else (f"Text: {place.passage}", right, others)


def _name(place: _Place, wrong: int, rng: random.Random) -> _Draft:
    # After the same word: "the Senate" may stand for "the Treasury", which "of Mexico" may not.
    return _cloze(place, wrong, rng, _NAME, lambda own, other: own[0] == other[0])


def _number(place: _Place, wrong: int, rng: random.Random) -> _Draft:
    return _cloze(place, wrong, rng, _NUMBER, lambda own, other: len(own[1]) == len(other[1]))


def _cloze(
    place: _Place,
    wrong: int,
    rng: random.Random,
    pattern: re.Pattern[str],
    fits: Callable[[tuple[str, str], tuple[str, str]], bool],
) -> _Draft:
    """The next sentence up to something that the passage names as well, against such things from outside the passage.

    Args:
        pattern: of what is left out, its second group; the first one is what stands before.
        fits: whether the groups of another match can stand against those of the right one.
    """
    passage, sentence = place.passage, place.lines[place.end]
    named = {match[2] for match in pattern.finditer(passage)}
    known = [match for match in pattern.finditer(sentence) if match[2] in named]
    if not known:
        return None
    match = rng.choice(known)
    tail = " ".join(sentence[match.end() :].split(" ")[: 1 + _FOLLOWING_WORDS])
    elsewhere = " ".join([*place.lines[: place.begin], *place.lines[place.end + 1 :]])
    others = {
        other[2]
        for other in pattern.finditer(elsewhere)
        if other[2] not in passage and fits((match[1], match[2]), (other[1], other[2]))
    }
    chosen = _alike(sorted(others), match[2], wrong)
    if chosen is None:
        return None
    context = f"Text: {passage} {sentence[: match.start(2)]}".rstrip()
    return context, match[2] + tail, [other + tail for other in chosen]
