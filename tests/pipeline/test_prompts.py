"""Prompt ids: one BOS or none, template tokens counted, limits kept on ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.pipeline.prompts import beginning, cut_middle, decode, encode, encode_after, frame, message_ids
from tests.pipeline.conftest import TURNS

Make = Callable[..., PreTrainedTokenizerBase]


@pytest.mark.parametrize("limit", [1000, 24], ids=["whole", "cut"])
def test_template_that_prints_bos_gives_exactly_one(make_tokenizer: Make, limit: int) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="[bos]" + TURNS)
    ids, _ = message_ids(tokenizer, "What is the value of the answer to the question in the text?", limit)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    around = frame(tokenizer, opening="Read", closing=" the text", answer="The value is", chat=True)
    assert (around.head + around.tail).count(tokenizer.bos_token_id) == 1


def test_tokenizer_without_bos_gives_none(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    assert tokenizer.bos_token_id is None
    ids, _ = message_ids(tokenizer, "word", 1000)
    assert ids[0] == tokenizer.convert_tokens_to_ids("[turn]")
    assert beginning(tokenizer) == []


def test_plain_completion_has_one_bos_if_the_tokenizer_adds_it(make_tokenizer: Make) -> None:
    with_bos = make_tokenizer(adds_bos=True, template="[bos]" + TURNS)
    assert frame(with_bos, chat=False).head == [with_bos.bos_token_id]
    assert frame(make_tokenizer(template=TURNS), chat=False).head == []
    ids, _ = message_ids(make_tokenizer(adds_bos=True), "word word", 1000)
    assert ids == list(make_tokenizer(adds_bos=True)("word word")["input_ids"])


def test_uncut_prompt_is_what_the_tokenizer_itself_makes(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="[bos]" + TURNS)
    message = "What is the value?\nRead the text."
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
    )
    assert message_ids(tokenizer, message, 1000) == (expected, 0)


def test_frame_around_text_is_the_rendered_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    around = frame(tokenizer, opening="Read the text:", closing="\n\nWhat?", answer="The value is", chat=True)
    ids = around.head + encode_after(tokenizer, " the people met.") + around.tail
    expected = "[turn]user\nRead the text: the people met.\n\nWhat?[end]\n[turn]assistant\nThe value is"
    assert tokenizer.decode(ids) == expected
    assert ids == encode(tokenizer, expected)


def test_answer_is_set_off_where_the_template_ends_without_white_space(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] }}[end]")
    around = frame(tokenizer, answer="The value is", chat=True)
    assert tokenizer.decode(around.tail) == "[end] The value is"


def test_answer_has_a_line_of_its_own_without_a_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    around = frame(tokenizer, opening="Read:", closing="\n\nWhat?", answer="The value is", chat=False)
    assert decode(tokenizer, around.tail) == "\n\nWhat?\nThe value is"


def test_long_prompt_keeps_limit_template_and_both_ends(make_tokenizer: Make) -> None:
    """Cutting text instead of ids can exceed the limit: a piece cut off in the middle of a word costs more tokens."""
    tokenizer = make_tokenizer(adds_bos=True, template="[bos]" + TURNS)
    message = "First of the people: " + "the city of Washington and the United States; " * 40 + "what is the last word?"
    inner = encode(tokenizer, message)
    template = len(frame(tokenizer, chat=True))
    for limit in range(template + 2, template + 40):
        ids, cut = message_ids(tokenizer, message, limit)
        room = limit - template
        assert len(ids) == limit
        assert cut == len(inner) - room
        assert ids == [
            *frame(tokenizer, chat=True).head,
            *inner[: room // 2],
            *inner[-(room - room // 2) :],
            *frame(tokenizer, chat=True).tail,
        ]
    assert decode(tokenizer, ids).startswith("[bos][turn]user\nFirst of")
    assert decode(tokenizer, ids).endswith("the last word?[end]\n[turn]assistant\n")


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), st.integers(2, 40), st.booleans())
def test_any_prompt_keeps_limit_and_both_ends_and_what_was_cut_is_counted(
    make_tokenizer: Make, message: str, room: int, chat: bool
) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="[bos]" + TURNS if chat else None)
    around, inner = frame(tokenizer, chat=chat), encode(tokenizer, message)
    ids, cut = message_ids(tokenizer, message, len(around) + room)
    assert len(ids) <= len(around) + room
    assert ids[: len(around.head)] == around.head
    assert ids[len(ids) - len(around.tail) :] == around.tail
    assert cut == max(0, len(inner) - room)
    if cut:
        kept = ids[len(around.head) : len(ids) - len(around.tail)]
        assert kept == inner[: room // 2] + inner[-(room - room // 2) :]


def test_limit_below_the_template_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    template = len(frame(tokenizer, chat=True))
    with pytest.raises(UserError, match=rf"data\.max_tokens: {template + 1} .* takes {template}"):
        message_ids(tokenizer, "word " * 100, template + 1)


def test_cut_middle_keeps_first_and_last() -> None:
    assert cut_middle(list(range(1, 11)), 6) == [1, 2, 3, 8, 9, 10]
    assert cut_middle(list(range(1, 11)), 5) == [1, 2, 8, 9, 10]
    assert cut_middle(list(range(1, 11)), 10) == list(range(1, 11))
    assert cut_middle([1, 2, 3], 1) == [3]


def test_encode_after_is_the_rest_of_a_longer_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    for text in (" the people", "\n\nQuestion: What?", "[end]\n"):
        assert encode(tokenizer, "The United States" + text) == encode(tokenizer, "The United States") + encode_after(
            tokenizer, text
        )
    with pytest.raises(ValueError, match="begin it with white space"):
        encode_after(tokenizer, "nd")
