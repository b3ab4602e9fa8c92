"""Examples of every task: exact lengths, answers that can be found and told apart, a text around them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple

import pytest
from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document, sentences
from sdtp.pipeline.prompts import decode
from sdtp.pipeline.ruler.settings import TASKS
from tests.pipeline.conftest import TURNS
from tests.pipeline.ruler.material import documents, examples

Make = Callable[..., PreTrainedTokenizerBase]
# Tasks whose facts stand in the corpus' text.
IN_TEXT = ("single", "multi_key", "multi_value", "multi_query", "variables", "qa")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("adds_bos", "template"), [(False, TURNS), (True, None), (True, "[bos]" + TURNS), (False, None)]
)
def test_prompts_have_exactly_the_asked_length_and_one_bos(
    make_tokenizer: Make, task: str, adds_bos: bool, template: str | None
) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    for length in (900, 901, 902, 1300):
        for example in examples(tokenizer, task, length=length, count=2):
            assert len(example.prompt_ids) == example.length == length
            assert example.prompt_ids.count(0) == (1 if adds_bos else 0)  # the id of [bos]
            assert example.chat is (template is not None)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_is_the_message_in_its_template_and_a_question_follows_the_text(make_tokenizer: Make, task: str) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    for example in examples(tokenizer, task):
        text = decode(tokenizer, example.prompt_ids)
        assert text.startswith(f"[turn]user\n{example.prompt}[end]\n[turn]assistant\n")
        assert not text.endswith(" ")
        body, question = example.prompt.split("\n\nQuestion: ")
        assert len(body) > 3 * len(question)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("template", [TURNS, None])
def test_context_is_the_text_without_instruction_question_and_template(
    make_tokenizer: Make, task: str, template: str | None
) -> None:
    tokenizer = make_tokenizer(template=template)
    for example in examples(tokenizer, task):
        start, end = example.context
        head, inner, tail = (
            decode(tokenizer, example.prompt_ids[piece])
            for piece in (slice(start), slice(start, end), slice(end, None))
        )
        body = example.prompt.split("\n\nQuestion: ")[0]
        assert body.endswith(inner)
        # What is before the text is said of every example alike, and is no white space.
        assert ("" if template is None else "[turn]user\n") + body[: -len(inner)] == head
        assert inner.startswith(" ")
        assert len(inner) > 3 * len(head)
        assert tail.startswith("\n\nQuestion: ")


@pytest.mark.parametrize("task", TASKS)
def test_every_reference_is_in_the_prompt_and_none_is_given_away_by_the_question(
    make_tokenizer: Make, task: str
) -> None:
    tokenizer = make_tokenizer()
    for example in examples(tokenizer, task):
        body = example.prompt.split("\n\nQuestion: ")[0].casefold()
        around = decode(tokenizer, example.prompt_ids).casefold().replace(body, "")
        assert example.references
        assert len(set(example.references)) == len(example.references)
        for reference in example.references:
            assert reference.casefold() in body
            assert reference.casefold() not in around
            assert sum(reference in other for other in example.references) == 1


@pytest.mark.parametrize("task", IN_TEXT)
def test_facts_stand_between_whole_sentences_of_the_corpus(make_tokenizer: Make, task: str) -> None:
    lines = {line for document in documents() for line in sentences(document)}
    for example in examples(make_tokenizer(), task, length=1500):
        body = example.prompt.split("\n\nQuestion: ")[0].replace("\n\nPassage: ", "")
        text = Document("", "", body[body.index(":") + 1 :])
        known = [line in lines for line in sentences(text)]
        assert sum(known) >= 8
        assert set(example.source.split("+")) <= {document.name for document in documents()}


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_seed_task_length_and_number_alone(make_tokenizer: Make, task: str) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    few, many = examples(tokenizer, task, count=2), examples(tokenizer, task, count=5)
    assert list(map(astuple, few)) == list(map(astuple, many[:2]))
    assert len({example.id for example in many}) == 5
    assert len({tuple(example.prompt_ids) for example in many}) == 5
    assert examples(tokenizer, task, count=1, seed=1)[0].references != few[0].references
    longer = examples(tokenizer, task, count=1, length=901)[0]
    assert longer.id != few[0].id
    assert longer.prompt != few[0].prompt


@pytest.mark.parametrize("task", TASKS)
def test_a_length_is_met_or_refused_with_the_shortest_that_will_do(make_tokenizer: Make, task: str) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    outcomes = []
    for length in range(60, 900, 30):
        try:
            (example,) = examples(tokenizer, task, length=length, count=1)
        except UserError as error:
            message = str(error)
            assert message.startswith(f"suites.ruler.lengths: {length} is too short for task {task}: ")
            least = int(message.removesuffix(" tokens").split()[-1])
            assert length < least < 900
            outcomes.append("refused")
        else:
            # The shortest list of made-up words cannot be made shorter to leave room for one that fits.
            assert length - (2 if task == "frequent_words" else 0) <= len(example.prompt_ids) <= length
            outcomes.append("met")
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"refused", "met"}


def test_a_fact_has_a_text_around_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    with pytest.raises(UserError) as refused:
        examples(tokenizer, "single", length=100, count=1)
    shortest = int(str(refused.value).split()[-2])
    (example,) = examples(tokenizer, "single", length=shortest, count=1)
    text = example.prompt.split("Text:")[1].split("\n\nQuestion")[0]
    fact = re.search(r" Whoever .*? \d+\.", text)
    assert fact is not None
    assert len(tokenizer(text.replace(fact[0], ""))["input_ids"]) == pytest.approx(32, abs=2)


def test_replies_may_be_twice_as_long_as_their_references(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    (example,) = examples(tokenizer, "multi_value", count=1)
    assert example.max_new_tokens == 2 * len(tokenizer(", ".join(example.references))["input_ids"])
    assert examples(tokenizer, "single", count=1)[0].max_new_tokens == 32


def test_every_document_is_used_before_one_is_used_twice(make_tokenizer: Make) -> None:
    begun = [example.source.split("+")[0] for example in examples(make_tokenizer(), "single", length=400, count=10)]
    assert Counter(begun[:5]).keys() == Counter(begun[5:]).keys() == {document.name for document in documents()}


@pytest.mark.parametrize("text", [[], [Document("blank", "b", " \n")]])
def test_a_text_without_words_is_refused(make_tokenizer: Make, text: list[Document]) -> None:
    with pytest.raises(UserError, match=rf"ruler\.source: {len(text)} documents without text"):
        examples(make_tokenizer(), "single", text=text)


def test_sentences_with_the_answer_are_left_out_of_the_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    (answer,) = examples(tokenizer, "single", count=1)[0].references
    spoilt = [
        Document(d.name, d.group, " ".join(line + f" It was {answer}5." for line in sentences(d))) for d in documents()
    ]
    (example,) = examples(tokenizer, "single", count=1, text=spoilt)
    assert example.references == [answer]
    assert example.prompt.count(answer) == 1
    assert len(example.prompt_ids) == 900


def test_a_text_of_nothing_but_answers_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    (answer,) = examples(tokenizer, "single", count=1)[0].references
    spoilt = [Document(f"{n}-x", str(n), f"It was {answer} then. " * 3) for n in range(5)]
    with pytest.raises(UserError, match=rf"10,000 sentences in a row, .* contain one of \['{answer}'\]"):
        examples(tokenizer, "single", count=1, text=spoilt)
