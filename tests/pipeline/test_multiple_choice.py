"""Multiple-choice questions over a text: the right choice is what the document says, the wrong ones are not."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document, sentences
from sdtp.pipeline.multiple_choice import CHOICES, LOCAL_TASKS, SHOT_CHOICES, SHOT_WORDS, Question, questions

WORDS = 60
COUNT = 12


def _letters(number: int) -> str:
    """A word of its own for each number, since digits are what one of the tasks asks for."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


@cache
def documents() -> tuple[Document, ...]:
    """Twenty texts whose sentences differ, with names and years that come again."""
    rng = random.Random(0)
    verbs, nouns = ("met", "saw", "praised", "left", "joined"), ("road", "river", "harbour", "market", "school", "mill")
    texts = []
    for number in range(20):
        names = [f"{a}{b}" for a in ("Ost", "Wer", "Lan", "Tor") for b in ("berg", "dale", "holm")]
        hosts = [f"{a}{b}" for a in ("Nor", "Sut", "Mid") for b in ("feld", "wick", "ton")]
        counts, ends = (
            [str(10 + rng.randrange(7)) for _ in range(8)],
            ("", " at noon", " late in the evening of a warm day"),
        )
        years = [str(1800 + rng.randrange(99)) for _ in range(8)]
        lines = [
            f"Line {_letters(number)} {_letters(line)}: {rng.choice(counts)} people of {rng.choice(names)} "
            f"{rng.choice(verbs)} the {rng.choice(nouns)} in {rng.choice(years)} by {rng.choice(hosts)}"
            f"{rng.choice(ends)}."
            for line in range(120)
        ]
        texts.append(Document(f"{number}-text", str(number), " ".join(lines)))
    return tuple(texts)


def made(task: str, split: str = "test", count: int = COUNT, words: int = WORDS, seed: int = 0) -> list[Question]:
    return list(questions(documents(), task, split, count=count, words=words, seed=seed))


def source(question: Question) -> list[str]:
    return sentences(next(document for document in documents() if document.name == question.source))


def passage(question: Question) -> str:
    """Up to the line after it, for tasks that have one."""
    return question.context.removeprefix("Text: ").split("\n")[0]


@pytest.mark.parametrize("task", LOCAL_TASKS)
@pytest.mark.parametrize(("split", "choices", "words"), [("test", CHOICES, WORDS), ("train", SHOT_CHOICES, SHOT_WORDS)])
def test_every_question_has_a_passage_and_different_choices(task: str, split: str, choices: int, words: int) -> None:
    found = made(task, split)
    assert [question.id for question in found] == [f"{task}-{split}-{number:05d}" for number in range(COUNT)]
    for question in found:
        assert len(set(question.choices)) == len(question.choices) == choices
        assert words <= len(passage(question).split()) <= words + 130  # four facts of twenty words, a sentence
        assert question.context == question.context.strip()
        assert all(choice == choice.strip() for choice in question.choices)
    assert len({question.context for question in found}) == COUNT
    assert set(Counter(question.answer for question in made(task, split, 30))) == set(range(choices))


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_smaller_set_is_the_beginning_of_a_larger_one_and_the_seed_decides(task: str) -> None:
    assert made(task, count=3) == made(task)[:3]
    assert not set(made(task, seed=1)) & set(made(task))


def test_shots_are_of_other_documents_than_questions() -> None:
    shots = {question.source for task in LOCAL_TASKS for question in made(task, "train", 20)}
    asked = {question.source for task in LOCAL_TASKS for question in made(task, "test", 20)}
    assert len(shots) == 4  # a fifth of twenty
    assert len(asked) > 10
    assert not shots & asked


def test_quote_goes_on_as_its_sentence_does() -> None:
    for question in made("sdtp_quote"):
        first = question.context.split("\nQuote: ")[1]
        whole = [line for line in source(question) if line in passage(question)]
        ends = [f"{first} {choice}" in whole for choice in question.choices]
        assert ends.index(True) == question.answer
        assert sum(ends) == 1
        # The others are the ends of other sentences of the passage: only the beginning tells them apart.
        assert all(any(line.endswith(choice) for line in whole) for choice in question.choices)


def test_fact_is_the_planted_one_that_is_asked_for() -> None:
    for question in made("sdtp_fact"):
        text, asked = question.context.split("\nQuestion: ")
        answer = asked.split("\nAnswer: ")[1]
        assert text.count(f"{answer} {question.choices[question.answer]}.") == 1
        assert all(text.count(choice) == 1 for choice in question.choices)
        assert len({re.sub(r"of \w+ ", "of X ", line) for line in [answer]}) == 1
        words = [choice.split() for choice in question.choices]
        assert len({colour for _, colour, _ in words}) == len({animal for _, _, animal in words}) == CHOICES


def test_next_is_the_sentence_after_the_passage() -> None:
    for question in made("sdtp_next"):
        lines = source(question)
        last = max(index for index, line in enumerate(lines) if passage(question).endswith(line))
        following = dict(pairwise(lines))[lines[last]]
        assert question.choices[question.answer] == following
        assert all(choice in lines and choice not in passage(question) for choice in question.choices)
        # None of the sentences that could stand for the wrong ones is nearer to the right one in length.
        apart = [abs(len(choice) - len(following)) for choice in question.choices]
        others = [line for line in lines if line not in passage(question) and line not in question.choices]
        assert max(apart) <= min(abs(len(line) - len(following)) for line in others)


@pytest.mark.parametrize(("task", "kind"), [("sdtp_name", r"[A-Z]\w+"), ("sdtp_number", r"\d+")])
def test_cloze_is_what_the_passage_names_and_the_document_goes_on_with(task: str, kind: str) -> None:
    kinds = set()
    for question in made(task, count=20):
        text = " ".join(source(question))
        shown = question.context.removeprefix("Text: ")
        assert f"{shown} {question.choices[question.answer]}" in text
        heads = [match[0] for choice in question.choices if (match := re.match(kind, choice))]
        assert len(heads) == CHOICES
        assert [head in shown for head in heads] == [index == question.answer for index in range(CHOICES)]
        # What may stand there: what follows the same word elsewhere, or has as many digits.
        before = shown.split()[-1] if task == "sdtp_name" else ""
        assert all(f"{before} {head}" in text for head in heads)
        kinds.add((before, len(heads[0]) if task == "sdtp_number" else 0))
        assert task == "sdtp_name" or len({len(head) for head in heads}) == 1
        # What follows is the same in all, and tells nothing.
        tails = [choice.removeprefix(head) for choice, head in zip(question.choices, heads, strict=True)]
        assert len(set(tails)) == 1
        assert len(tails[0].split()) <= 5  # a comma or a full stop may be one of them
    assert kinds == ({("of", 0), ("by", 0)} if task == "sdtp_name" else {("", 2), ("", 4)})


@pytest.mark.parametrize("task", ["sdtp_quote", "sdtp_next", "sdtp_name", "sdtp_number"])
def test_text_that_has_no_such_question_is_refused(task: str) -> None:
    short = [Document(str(number), str(number), "Yes. No. Perhaps. " * 40) for number in range(4)]
    with pytest.raises(
        UserError, match=rf"harness.tasks: {task} cannot be made of 4 documents: no further passage of 60"
    ):
        list(questions(short, task, "test", count=1, words=WORDS, seed=0))


def test_no_context_is_asked_twice() -> None:
    few = [Document(str(number), str(number), document.text[:1500]) for number, document in enumerate(documents()[:2])]
    with pytest.raises(UserError, match=r"was found after \d+ questions, of 10,000 tried") as refused:
        list(questions(few, "sdtp_next", "test", count=100, words=WORDS, seed=0))
    assert int(str(refused.value).split("after ")[1].split()[0]) >= 5
