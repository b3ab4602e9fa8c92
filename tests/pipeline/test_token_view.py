"""Texts of tokens keep spaces and characters whole; removal stages follow from what each stage kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdtp.errors import UserError
from sdtp.pipeline import token_view
from sdtp.pipeline.token_view import removal_stages, token_texts

# Characters of two, three and four bytes, one that is itself U+FFFD, and a joined emoji; none is in the vocabulary.
STRANGE = "Ä‽𝄞 \N{REPLACEMENT CHARACTER} naïve 人民, 👩‍🚀!"


def sentencepiece(*words: str) -> PreTrainedTokenizerBase:
    """A tokenizer with a piece for each word, and pieces of single bytes for anything else."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *words, "<unk>"]
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def ids_of(text: str, words: tuple[str, ...]) -> list[int]:
    """Ids of `sentencepiece(*words)`, those of bytes wherever no word is."""
    ids: list[int] = []
    marked = text.replace(" ", "▁")
    while marked:
        word = next((word for word in words if marked.startswith(word)), "")
        if word:
            ids.append(256 + words.index(word))
        else:
            ids += marked[0].replace("▁", " ").encode()
        marked = marked[max(1, len(word)) :]
    return ids


def test_removal_stages_by_hand() -> None:
    # Stage 0 drops 1 and 4, stage 1 drops 2, stage 2 drops nothing.
    assert removal_stages([[0, 2, 3, 5], [0, 3, 5], [0, 3, 5]], 6) == [3, 0, 1, 3, 0, 3]
    with pytest.raises(UserError, match="stage 1: position 1 was not present; accepted"):
        removal_stages([[0, 2], [0, 1]], 3)
    with pytest.raises(UserError, match="stage 0: position 3 was not present; accepted"):
        removal_stages([[0, 3]], 3)


def test_token_texts_keep_the_space_that_a_token_carries() -> None:
    tokenizer = sentencepiece("▁the", "▁cat", "s")
    the, cat, s = 256, 257, 258
    assert tokenizer.decode([cat]) == "cat"  # decoded alone, a token loses its space
    assert token_texts(tokenizer, [the, cat, s, cat]) == ["the", " cat", "s", " cat"]
    assert token_texts(tokenizer, [the, *[cat] * 99]) == ["the", *[" cat"] * 99]  # in later pieces too


def test_characters_split_over_tokens_are_whole(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a‽b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # the middle one has three bytes
    assert token_texts(tokenizer, ids) == ["a", "", "", "‽", "b"]


@pytest.mark.parametrize("shift", range(1, 36, 5))
def test_pieces_join_to_the_whole_text(shift: int, make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    # Wherever a piece ends within a character.
    text = "x" * shift + " the people " + STRANGE * 3 + " of " + "人" * 40 + "\N{REPLACEMENT CHARACTER}" * 3
    words = ("▁the", "▁people", "▁of", ",")
    byte_level, with_bytes = make_tokenizer(), sentencepiece(*words)
    for tokenizer, ids in (
        (byte_level, byte_level(text, add_special_tokens=False)["input_ids"]),
        (with_bytes, ids_of(text, words)),
    ):
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids) > token_view._PIECE
        assert "".join(texts) == tokenizer.decode(ids) == text
        assert sum(piece.count("\N{REPLACEMENT CHARACTER}") for piece in texts) == 6


def test_bytes_that_are_no_character(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = make_tokenizer()
    a, interrobang, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "‽", "b"))
    texts = token_texts(tokenizer, [*a, *interrobang[:2], *b, *interrobang])
    assert texts == ["a", "\N{REPLACEMENT CHARACTER}", "", "b", "", "", "‽"]
    assert token_texts(tokenizer, []) == []


def test_texts_of_a_long_prompt_take_no_long(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    # Decoded tokens, not seconds: each is decoded with a bounded number of others.
    tokenizer = make_tokenizer()
    ids = tokenizer("the people " * 400, add_special_tokens=False)["input_ids"]
    decoded = 0
    original = tokenizer.decode

    def counting(these: list[int], **kwargs: bool) -> str:
        nonlocal decoded
        decoded += len(these)
        return str(original(these, **kwargs))

    tokenizer.decode = counting  # type: ignore[method-assign]
    assert "".join(token_texts(tokenizer, ids)) == "the people " * 400
    assert decoded < 25 * len(ids)
