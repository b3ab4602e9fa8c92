"""Lists of words: the asked ones come up most often, nothing is part of them, lengths add up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.evaluation.ruler.tasks import RulerExample
from sdtp.pipeline.corpus import Document
from sdtp.pipeline.ruler.words import _counts, vocabulary
from tests.pipeline.ruler.material import examples

Make = Callable[..., PreTrainedTokenizerBase]


def listed(example: RulerExample) -> list[str]:
    return example.prompt.split("List:")[1].split("\n\n")[0].split()


def test_common_words_come_up_often_and_all_others_rarely(make_tokenizer: Make) -> None:
    for example in examples(make_tokenizer(), "common_words", count=6):
        counts = Counter(listed(example))
        assert {word: count for word, count in counts.items() if count > 2} == dict.fromkeys(example.references, 6)
        assert len(example.references) == 3
        others = set(counts) - set(example.references)
        assert sum(counts[word] == 2 for word in others) >= 5
        for answer in example.references:
            assert not [word for word in others if word in answer or answer in word]
        assert "Which 3 words" in example.prompt


def test_no_word_is_part_of_an_answer_or_an_answer_of_it(make_tokenizer: Make) -> None:
    """A reply with "unitedly" would have the answer "united" in it."""
    stems = ["".join(pair) + end for pair in product("bdfgkmprst", "aeiou") for end in ("lom", "ner")]
    text = " ".join(f"{stem} {stem}s {stem}ing un{stem}" for stem in stems)
    for example in examples(make_tokenizer(), "common_words", text=[Document("a", "a", text)], count=5):
        words = set(listed(example))
        for answer in example.references:
            assert [word for word in words if word in answer or answer in word] == [answer]
        assert len(words) > 20


def test_longer_lists_have_more_rare_words_and_as_many_common_ones(make_tokenizer: Make) -> None:
    short, long = (Counter(listed(*examples(make_tokenizer(), "common_words", length=n, count=1))) for n in (600, 1500))
    assert [count for _, count in short.most_common(3)] == [count for _, count in long.most_common(3)] == [6, 6, 6]
    assert len(long) > 2 * len(short)


def test_vocabulary_has_whole_lower_case_words_of_some_length_without_those_of_the_prompt() -> None:
    text = "Nations united: the well-known people's country met; which words often, extraordinarily a country."
    assert vocabulary([Document("a", "a", text), Document("b", "b", "people met again")]) == [
        "again",
        "country",
        "people",
        "united",
    ]


def test_made_up_words_fall_with_the_square_of_their_rank(make_tokenizer: Make) -> None:
    for length in (900, 1500):
        for example in examples(make_tokenizer(), "frequent_words", length=length):
            counts = Counter(listed(example)).most_common()
            often = counts[0][1]
            assert often >= 18
            for rank, (_, count) in enumerate(counts, 1):
                # Words that fill the last tokens come up once, as the last ranks do.
                assert count == max(1, often // rank**2)
            assert [word for word, _ in counts[:3]] == example.references
            assert counts[2][1] > counts[3][1]
            assert all(re.fullmatch("([^aeiou][aeiou]){3}", word) for word, _ in counts)
            repeated = sum(count for _, count in counts if count > 1)
            assert repeated > 0.8 * sum(count for _, count in counts)


def test_shortest_list_tells_the_third_word_from_the_fourth(make_tokenizer: Make) -> None:
    for length in range(150, 900, 10):
        try:
            (example,) = examples(make_tokenizer(), "frequent_words", length=length, count=1)
        except UserError:
            continue
        counts = [count for _, count in Counter(listed(example)).most_common()]
        assert 18 <= counts[0] < 25
        assert counts[2] >= 2 > counts[-1]
        assert counts[2] > counts[3]
        return
    pytest.fail("no length is accepted")


def test_third_word_is_told_from_the_fourth_at_every_length() -> None:
    for often in range(18, 400):
        first, second, third, fourth, *_ = _counts(often)
        assert first > second > third > fourth >= 1
        assert third >= 2  # told from the words that fill up


def test_words_are_in_no_order(make_tokenizer: Make) -> None:
    for task in ("common_words", "frequent_words"):
        (example,) = examples(make_tokenizer(), task, count=1)
        places = [place for place, word in enumerate(listed(example)) if word == example.references[0]]
        assert max(places) - min(places) > len(listed(example)) / 3


def test_too_few_words_are_refused(make_tokenizer: Make) -> None:
    text = [Document("a", "a", "United people build another country, always together.")]
    with pytest.raises(UserError, match=r"ruler\.lengths: 900 is too long .* text has 6 different words"):
        examples(make_tokenizer(), "common_words", text=text, count=1)
    with pytest.raises(UserError, match=r"ruler\.common_words: 8 is above 6, what the text has"):
        examples(make_tokenizer(), "common_words", text=text, common_words=8, count=1)
