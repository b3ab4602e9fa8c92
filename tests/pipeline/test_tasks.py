"""Examples made from a corpus: exact lengths, same-form facts, nothing shared between training and test."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document
from sdtp.pipeline.facts import TEST, TRAIN, Vocabulary
from sdtp.pipeline.prompts import decode
from sdtp.pipeline.tasks import CONTINUATION_TOKENS, Example, continuation_examples, retrieval_examples
from tests.pipeline.conftest import TURNS

Make = Callable[..., PreTrainedTokenizerBase]


def documents(count: int = 6, length: int = 200) -> list[Document]:
    rng = random.Random(0)
    words = ["people", "states", "congress", "country", "met", "city", "united", "value"]
    return [
        Document(
            f"{year}-x",
            str(year),
            " ".join(f"The {' '.join(rng.choices(words, k=6))} of document {year}." for _ in range(length)),
        )
        for year in range(count)
    ]


def retrieval(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary = TEST,
    *,
    count: int = 8,
    distractors: int = 8,
    max_tokens: int = 900,
    seed: int = 0,
) -> list[Example]:
    return list(
        retrieval_examples(
            tokenizer,
            documents(),
            vocabulary,
            count=count,
            distractors=distractors,
            max_tokens=max_tokens,
            split="test",
            seed=seed,
        )
    )


def test_training_and_test_vocabularies_share_nothing() -> None:
    assert len(TRAIN.phrasings) >= 12
    assert len(TRAIN.value_types) >= 6
    assert min(len(TEST.phrasings), len(TEST.value_types)) >= 3
    for part in ("fact", "question", "answer"):
        assert not {getattr(p, part) for p in TRAIN.phrasings} & {getattr(p, part) for p in TEST.phrasings}
    assert not {t.kind for t in TRAIN.value_types} & {t.kind for t in TEST.value_types}
    values = [{value.lower() for t in v.value_types for value in t.values} for v in (TRAIN, TEST)]
    assert not values[0] & values[1]
    assert not set(TRAIN.entities) & set(TEST.entities)


@pytest.mark.parametrize("vocabulary", [TRAIN, TEST], ids=["train", "test"])
def test_values_and_entities_are_distinct_and_facts_end_in_their_value(vocabulary: Vocabulary) -> None:
    assert len(set(vocabulary.entities)) == len(vocabulary.entities)
    assert vocabulary.max_distractors >= 16
    for value_type in vocabulary.value_types:
        assert len(set(value_type.values)) == len(value_type.values)
    for phrasing in vocabulary.phrasings:
        assert phrasing.fact == phrasing.answer + " {value}."
        assert "{entity}" in phrasing.answer
        assert "{entity}" not in phrasing.question


def test_prompts_have_exactly_the_asked_length(make_tokenizer: Make) -> None:
    for tokenizer in (make_tokenizer(template=TURNS), make_tokenizer(adds_bos=True)):
        for max_tokens in (900, 901, 4096):
            examples = retrieval(tokenizer, count=2, max_tokens=max_tokens)
            assert [len(example.prompt_ids) for example in examples] == [max_tokens] * 2


def test_a_question_has_one_answer_among_facts_of_the_same_form(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    for number, example in enumerate(retrieval(tokenizer, count=16, distractors=8)):
        phrasing = TEST.phrasings[number % len(TEST.phrasings)]
        text = decode(tokenizer, example.prompt_ids)
        beginning, answer = text.split("[turn]assistant\n")
        kind = next(t for t in TEST.value_types if phrasing.answer.split("{entity}")[0].format(kind=t.kind) in answer)
        planted = {
            (entity, value)
            for entity in TEST.entities
            for value in kind.values
            if phrasing.fact.format(kind=kind.kind, entity=entity, value=value) in beginning
        }
        assert len(planted) == 9
        assert len({entity for entity, _ in planted}) == len({value for _, value in planted}) == 9
        asked = [value for entity, value in planted if phrasing.answer.format(kind=kind.kind, entity=entity) == answer]
        assert [" " + value for value in asked] == [example.response]
        assert decode(tokenizer, example.response_ids) == example.response
        assert f"Question: {phrasing.question.format(kind=kind.kind)}[end]" in beginning


def test_prompt_text_is_the_message_without_its_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    for example in retrieval(tokenizer, count=3):
        assert decode(tokenizer, example.prompt_ids).startswith(f"[turn]user\n{example.prompt}[end]\n[turn]assistant\n")


def test_facts_stand_at_all_depths_and_any_of_them_is_asked(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    depths = []
    for example in retrieval(tokenizer, count=60):
        answer = decode(tokenizer, example.prompt_ids).split("[turn]assistant\n")[1]
        depths.append(example.prompt.index(answer + example.response) / len(example.prompt))
    assert Counter(int(4 * depth) for depth in depths).keys() == {0, 1, 2, 3}


def test_phrasings_and_kinds_of_value_take_turns(make_tokenizer: Make) -> None:
    examples = retrieval(make_tokenizer(template=TURNS), count=16, distractors=1, max_tokens=300)
    kinds = [t.kind for e in examples for t in TEST.value_types if e.response.strip() in t.values]
    names = [TEST.phrasings[number % 4].name for number in range(16)]
    assert len(set(zip(names, kinds, strict=True))) == 16


def test_examples_depend_on_the_seed_and_on_nothing_else(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    assert retrieval(tokenizer, count=4) == retrieval(tokenizer, count=8)[:4]
    assert retrieval(tokenizer, count=4, seed=1)[0].prompt_ids != retrieval(tokenizer, count=4)[0].prompt_ids


def test_every_document_is_used_before_one_is_used_twice(make_tokenizer: Make) -> None:
    examples = retrieval(make_tokenizer(template=TURNS), count=12, distractors=1, max_tokens=240)
    begun = [example.source.split("+")[0] for example in examples]
    assert len(set(begun[:6])) == len(set(begun[6:])) == 6


def test_limits_are_refused_by_key(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    with pytest.raises(UserError, match=rf"data\.distractors: {TEST.max_distractors + 1} "):
        retrieval(tokenizer, distractors=TEST.max_distractors + 1)
    with pytest.raises(UserError, match=r"data\.max_tokens: 120 is too short for 9 facts"):
        retrieval(tokenizer, max_tokens=120)


def test_continuation_is_the_text_that_follows(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="[bos]" + TURNS)
    texts = " ".join(" ".join(document.text.split()) for document in documents() * 2)
    examples = list(
        continuation_examples(tokenizer, documents(), count=7, max_tokens=256, split="test", seed=0),
    )
    for example in examples:
        assert len(example.prompt_ids) == 256
        assert len(example.response_ids) == CONTINUATION_TOKENS
        assert example.prompt_ids.count(tokenizer.bos_token_id) == 1
        assert example.prompt_ids[0] == tokenizer.bos_token_id
        assert decode(tokenizer, example.prompt_ids[1:] + example.response_ids) == example.prompt + example.response
        assert (example.prompt + example.response).strip() in texts
    assert len({example.id for example in examples}) == 7
