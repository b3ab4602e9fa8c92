"""Questions about passages: one has the answer, no other text does; rows of a file are read or refused by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.pipeline.corpus import sentences
from sdtp.pipeline.prompts import decode
from sdtp.pipeline.ruler.profiles import _SURNAMES, _TRAITS, MOST_PEOPLE, Passage
from sdtp.pipeline.ruler.questions import read_passages
from tests.pipeline.conftest import TURNS
from tests.pipeline.ruler.material import documents, examples

Make = Callable[..., PreTrainedTokenizerBase]
POOL = [Passage(f"The {n}th town lies at the lake of {name}.", f"Q{n}?", (name, name + "s"), "It is") for n, name in
        enumerate(["Orsa", "Belmer", "Tivoun", "Kadrel", "Lumo"])]  # fmt: skip


def passages(prompt: str) -> list[str]:
    return prompt.split("\n\nQuestion: ")[0].split("\n\nPassage: ")[1:]


def test_one_passage_has_the_answer_among_others_of_its_kind(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    ranks = set()
    for example in examples(tokenizer, "qa", count=10, length=1500):
        (answer,) = example.references
        parts = passages(example.prompt)
        having = [part for part in parts if answer.casefold() in part.casefold()]
        people = [part for part in parts if any(name in part for name in _SURNAMES)]
        assert len(having) == 1
        assert len(people) == 4
        assert len(parts) > 6
        reply = decode(tokenizer, example.prompt_ids).split("[turn]assistant\n")[1]
        name = next(name for name in _SURNAMES if name in reply)
        assert name in having[0]
        assert sum(name in part for part in parts) <= 2  # two people may share a surname
        ranks.add(parts.index(having[0]) * 4 // len(parts))
    assert len(ranks) == 4


def test_short_prompts_have_as_many_passages_as_fit(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    counts = [
        sum(any(name in part for name in _SURNAMES) for part in passages(example.prompt))
        for length in (420, 620, 1300)
        for example in examples(tokenizer, "qa", length=length, count=1)
    ]
    assert counts[0] < counts[1] < counts[2] == 4


def test_more_passages_than_there_are_people_are_as_many_as_there_are(make_tokenizer: Make) -> None:
    (example,) = examples(make_tokenizer(), "qa", distractors=5000, length=1500, count=1)
    parts = passages(example.prompt)
    assert sum(any(name in part for name in _SURNAMES) for part in parts) == 6
    assert len(example.prompt_ids) == 1500


def test_values_are_told_from_each_other_and_from_all_sentences() -> None:
    values = [value for trait in _TRAITS for value in trait.values]
    sentences = [text for trait in _TRAITS for text in (trait.fact, trait.question, trait.reply)]
    for value in values:
        assert sum(value.casefold() in other.casefold() for other in values) == 1
        assert not [text for text in sentences if value.casefold() in text.casefold()]
        assert not [name for name in _SURNAMES if value.casefold() in name.casefold()]
    assert len(set(_SURNAMES)) == 24
    assert MOST_PEOPLE == 24 * 30


def test_passages_of_a_pool_are_asked_in_turn(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    found = examples(tokenizer, "qa", pool=POOL, count=10)
    assert sorted(example.references[0] for example in found[:5]) == sorted(own.answers[0] for own in POOL)
    for example in found:
        asked = next(own for own in POOL if list(own.answers) == example.references)
        assert f"Question: {asked.question}" in example.prompt
        assert sum(own.text in example.prompt for own in POOL) == 4
        assert example.prompt.count(asked.text) == 1
        assert decode(tokenizer, example.prompt_ids).endswith("\nIt is")
    assert [example.prompt for example in found[:5]] != [example.prompt for example in found[5:]]


def test_passages_and_sentences_with_an_answer_are_no_distractors(make_tokenizer: Make) -> None:
    # The second passage has the first one's answer in other letters, the third its text; the corpus has the last one's.
    word = sentences(documents()[0])[0].split()[1]
    pool = [
        Passage(f"Tivoun is called the {word} town.", "How is it called?", (word,), "The"),
        Passage("Orsa lies in the north.", "Where?", ("NORTH",), "In the"),
        Passage("Go north to Belmer.", "Where to?", ("Belmer",), "To"),
        Passage("Orsa lies in the north.", "What?", ("Orsa",), "It is"),
    ]
    for example in examples(make_tokenizer(), "qa", pool=pool, count=4):
        body = example.prompt.split("\n\nQuestion")[0].casefold()
        assert body.count(example.references[0].casefold()) == 1
        assert len(example.prompt_ids) == 900


def test_longest_way_to_write_the_answer_limits_the_reply(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    long = "the very long way to write the name of the lake"
    pool = [Passage(f"It is {long}, or Orsa.", "Where?", ("Orsa", long), "It is")]
    (example,) = examples(tokenizer, "qa", pool=pool, count=1)
    assert example.max_new_tokens == 2 * len(tokenizer(long)["input_ids"]) > 32


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_rows_of_a_file_are_passages(tmp_path: Path) -> None:
    row = {"context": " Paris \n is here. ", "question": " Where? ", "answers": ["Paris ", "paris", "Paris"]}
    squad = {"id": 7, "context": "A b.", "question": "Q?", "answers": {"text": ["A"], "answer_start": [0]}}
    unanswered = {"context": "A b.", "question": "Q?", "answers": {"text": [], "answer_start": []}}
    assert read_passages(write(tmp_path / "p.jsonl", row, squad, "", unanswered), "suites.ruler.passages") == [
        Passage("Paris is here.", "Where?", ("Paris", "paris"), "The answer is"),
        Passage("A b.", "Q?", ("A",), "The answer is"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "c", "question": "q"}, "field 'answers' is missing; a row needs context, question, answers"),
        ({"context": " ", "question": "q", "answers": ["a"]}, "field 'context' is ' '; text is needed"),
        ({"context": "c", "question": None, "answers": ["a"]}, "field 'question' is None; text is needed"),
        ({"context": "c", "question": "q", "answers": "a"}, "field 'answers' is 'a'; a list of texts is needed"),
        ({"context": "c", "question": "q", "answers": [" "]}, r"field 'answers' is \[' '\]; a list of texts is needed"),
        ({"context": "c", "question": "q", "answers": [1]}, r"field 'answers' is \[1\]; a list of texts is needed"),
        ("[]", r"\[\] is not a JSON object"),
    ],
)
def test_malformed_rows_are_refused_by_line(tmp_path: Path, row: Any, message: str) -> None:
    good = {"context": "c", "question": "q", "answers": ["a"]}
    with pytest.raises(UserError, match=f"p.jsonl, line 2: {message}"):
        read_passages(write(tmp_path / "p.jsonl", good, row), "suites.ruler.passages")


def test_files_without_passages_are_refused(tmp_path: Path) -> None:
    unanswered = {"context": "c", "question": "q", "answers": []}
    with pytest.raises(UserError, match=r"suites\.ruler\.passages: .*p.jsonl has no row with an answer"):
        read_passages(write(tmp_path / "p.jsonl", unanswered), "suites.ruler.passages")
    with pytest.raises(UserError, match=r"suites\.ruler\.passages: no file '.*none.jsonl'; a JSON-lines file"):
        read_passages(str(tmp_path / "none.jsonl"), "suites.ruler.passages")


def test_empty_pool_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(UserError, match=r"suites\.ruler\.passages: there are none"):
        examples(make_tokenizer(), "qa", pool=[], text=documents())
