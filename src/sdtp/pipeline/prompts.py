"""Text to prompt ids: the model's chat template, one beginning-of-sequence token at most, length limits on ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdtp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for the text between `opening` and `closing` while the template is rendered; no template or text holds it.
_PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}sdtp\N{OBJECT REPLACEMENT CHARACTER}"
# Tokens of a text that follows other text are read after this letter: alone, some tokenizers mark a word's beginning.
_ANCHOR = "a"


@dataclass(frozen=True)
class Frame:
    """The token ids around the part of a prompt whose length can vary."""

    head: list[int]
    tail: list[int]

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` alone: special tokens written out in it are recognised, none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of `ids`, special tokens written out."""
    return str(tokenizer.decode(ids))


def encode_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` as it continues a word: `text` starts with white space or punctuation.

    Concatenating such ids gives a prompt of an exact length, which encoding a cut text again would not.
    """
    anchor = encode(tokenizer, _ANCHOR)
    ids = encode(tokenizer, _ANCHOR + text)
    if ids[: len(anchor)] != anchor:
        raise ValueError(f"text {text[:40]!r} merges with the letter before it: begin it with white space")
    return ids[len(anchor) :]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer itself puts before a text (its beginning-of-sequence token), or none."""
    plain = encode(tokenizer, _ANCHOR)
    ids = list(tokenizer(_ANCHOR)["input_ids"])
    return ids[: ids.index(plain[0])]


def frame(
    tokenizer: PreTrainedTokenizerBase, *, opening: str = "", closing: str = "", answer: str = "", chat: bool
) -> Frame:
    """Ids before and after the variable part of one user message.

    Args:
        opening, closing: the message's own text before and after the variable part; `closing` starts with white space.
        answer: text that opens the model's reply, without white space around it.
        chat: True to use the model's chat template, whose beginning-of-sequence token is then the only one;
            False for a plain completion, which starts with what the tokenizer puts before any text.
    """
    if not chat:
        after = closing + ("\n" + answer if answer else "")
        tail = encode_after(tokenizer, after) if after else []
        return Frame(beginning(tokenizer) + encode(tokenizer, opening), tail)
    rendered = render(tokenizer, opening + _PLACEHOLDER + closing)
    before, after = rendered.split(_PLACEHOLDER)
    if answer:
        after += answer if after[-1:].isspace() else " " + answer
    return Frame(encode(tokenizer, before), encode_after(tokenizer, after))


def context_between(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], before: str, after: str, *, chat: bool
) -> tuple[int, int]:
    """Where in a prompt's ids the part of its message between `before` and `after` begins and ends.

    Both are found by their own ids, from the prompt's two ends: a token that they share with what lies between belongs
    to that, and so does what the tokenizer reads otherwise beside it.

    Args:
        tokenizer: the model's.
        ids: the prompt, its message's middle cut out or not.
        before, after: the message's own text on the two sides.
        chat: as `frame`.
    """
    around = frame(tokenizer, chat=chat)
    # A prompt that was cut has the message's own ids between the template's, a whole one was read in one piece.
    heads, tails = [around.head + encode(tokenizer, before)], [encode(tokenizer, after) + around.tail]
    if chat:
        rendered = render(tokenizer, before + _PLACEHOLDER + after).split(_PLACEHOLDER)
        heads.append(encode(tokenizer, rendered[0]))
        tails.append(encode(tokenizer, rendered[1]))
    start = max(_common(ids, head) for head in heads)
    return start, max(start, len(ids) - max(_common(ids[::-1], tail[::-1]) for tail in tails))


def _common(ids: list[int], others: list[int]) -> int:
    """How many first ids are the same."""
    pairs = zip(ids, others, strict=False)
    return next((place for place, (own, other) in enumerate(pairs) if own != other), min(len(ids), len(others)))


def render(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """The chat template's text for one user message, up to where the model's reply begins."""
    messages = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def message_ids(tokenizer: PreTrainedTokenizerBase, message: str, max_tokens: int) -> tuple[list[int], int]:
    """Prompt ids of one message, at most `max_tokens` of them, and how many of the message's tokens were cut.

    With a chat template the limit counts its tokens, and only the message is cut: its middle goes, because a prompt's
    instruction stands at its beginning or its end. Cutting ids keeps the limit; a cut text encoded again may not.
    """
    chat = tokenizer.chat_template is not None
    ids = encode(tokenizer, render(tokenizer, message)) if chat else beginning(tokenizer) + encode(tokenizer, message)
    if len(ids) <= max_tokens:
        return ids, 0
    around = frame(tokenizer, chat=chat)
    room = max_tokens - len(around)
    if room < 2:
        raise UserError(
            f"data.max_tokens: {max_tokens} leaves no room for a prompt: the chat template alone takes {len(around)}"
        )
    inner = encode(tokenizer, message)
    return around.head + cut_middle(inner, room) + around.tail, max(0, len(inner) - room)


def cut_middle(ids: list[int], length: int) -> list[int]:
    """The first and the last half of `ids`, `length` >= 1 in all; an odd one more at the end, where questions stand."""
    if len(ids) <= length:
        return ids
    first = length // 2
    return ids[:first] + ids[len(ids) - (length - first) :]
