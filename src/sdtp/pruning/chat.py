"""Protection by role: a chat rendered to token ids, and which of them are the system prompt and the question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

# Roles that chats have; one of them that a conversation lacks protects nothing, any other is a mistake.
ROLES = ("system", "developer", "user", "assistant", "tool")

# What `apply_chat_template` takes for its own tokenizer call, which is not made here: they would do nothing.
_NOT_OF_THE_TEMPLATE = {
    "max_length",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}

_Chat = list[dict[str, Any]]


def protect_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
    *,
    every: Collection[str] = ("system",),
    last: Collection[str] = ("user",),
    **template_kwargs: Any,
) -> tuple[BatchEncoding, torch.Tensor]:
    """Token ids of a chat, and the `protect=` mask of a `TokenPruner` that keeps chosen messages whole.

    The ids are those of the tokenizer's own chat template, with no special token added to what it prints. Protected is
    a message's text as given, not the template's words around it, nor tool calls, nor a system prompt that only the
    template adds; a message without text has no tokens to protect.

    Examples:
        >>> inputs, protect = protect_messages(tokenizer, messages, add_generation_prompt=True)
        >>> with pruner(model, protect=protect):
        ...     out = model.generate(**inputs.to(model.device), max_new_tokens=128)

    Args:
        tokenizer: a fast tokenizer, which knows the characters of each token, with a chat template.
        messages: one conversation, or a batch of them. A message is a mapping with a `role` and a `content`: a string,
            or parts `{"type": "text", "text": ...}`, which are joined to one string.
        every: roles whose every message is protected.
        last: roles whose last message is protected.
        template_kwargs: arguments of `apply_chat_template` for the template, such as `add_generation_prompt` or
            `tools`.

    Returns:
        inputs: `input_ids` and `attention_mask`, LongTensors [batch, tokens], shorter rows padded on the left.
        protect: [batch, tokens] bool, True at each token that has a character of a chosen message; False at padding.

    Raises:
        ValueError: a slow tokenizer, one without a chat template, or without a padding token for rows of different
            length; an empty or malformed conversation; content other than text; an unknown role in `every` or `last`;
            an argument that is not the template's; a chosen message that the template does not print as it is.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not know which characters a token stands for: give a fast tokenizer"
        )
    if refused := sorted(_NOT_OF_THE_TEMPLATE & template_kwargs.keys()):
        raise ValueError(f"{', '.join(refused)}: only arguments of the chat template are accepted")
    chats = _conversations(messages)
    _check_roles("every", every, chats)
    _check_roles("last", last, chats)

    def render(chat: _Chat) -> str:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **template_kwargs))

    texts = [render(chat) for chat in chats.values()]
    inputs = tokenizer(
        texts,
        add_special_tokens=False,
        padding=len(texts) > 1,
        padding_side="left",
        return_tensors="pt",
        return_offsets_mapping=True,
        return_attention_mask=True,
        return_token_type_ids=False,
    )
    starts, ends = inputs.pop("offset_mapping").unbind(-1)  # [batch, tokens] each, 0 at padding
    protect = torch.zeros_like(starts, dtype=torch.bool)
    for row, (name, chat, text) in enumerate(zip(chats, chats.values(), texts, strict=True)):
        for index in _chosen(chat, every, last):
            for start, end in _find(render, chat, index, text, f"{name}[{index}]"):
                protect[row] |= (starts[row] < end) & (ends[row] > start)
    return inputs, protect


def _conversations(messages: Any) -> dict[str, _Chat]:
    """The conversations by the name that errors call them, content as strings."""
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages is {messages!r}: a list of at least one message is needed")
    if isinstance(messages[0], Mapping):
        return {"messages": [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]}
    chats = {}
    for row, chat in enumerate(messages):
        if not isinstance(chat, Sequence) or not chat:
            raise ValueError(f"messages[{row}] is {chat!r}: a list of at least one message is needed")
        chats[f"messages[{row}]"] = [_message(message, f"messages[{row}][{i}]") for i, message in enumerate(chat)]
    return chats


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{name} is {message!r}: a mapping with a role and a content is needed")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise ValueError(f"{name} has content of type {type(content).__name__}: a string or parts of text are needed")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'{name} has a part of type {kind}: only {{"type": "text", "text": ...}} is supported')
    # Most templates of text models take strings only; those that walk the parts print them one after the other.
    return {**message, "content": "".join(part["text"] for part in content)}


def _check_roles(argument: str, roles: Collection[str], chats: Mapping[str, _Chat]) -> None:
    known = {*ROLES, *(message["role"] for chat in chats.values() for message in chat)}
    if not known.issuperset(roles):
        raise ValueError(f"{argument} is {roles!r}: it must be a list of roles among {', '.join(sorted(known))}")


def _chosen(chat: _Chat, every: Collection[str], last: Collection[str]) -> list[int]:
    """Indices of the messages to protect that have text."""
    final = {message["role"]: index for index, message in enumerate(chat)}
    return [
        index
        for index, message in enumerate(chat)
        if (message["role"] in every or (message["role"] in last and final[message["role"]] == index))
        and (message.get("content") or "").strip()
    ]


def _find(render: Callable[[_Chat], str], chat: _Chat, index: int, text: str, name: str) -> list[tuple[int, int]]:
    """First character and end of a message's content in the rendered `text`, wherever the template prints it.

    Searching for the content would also find a quotation, a role's name in a header, or words of the template. So the
    chat is rendered again with a mark inside the content: where the mark stands is the content, and the mark taken
    out, nothing else may differ. It stands in the middle, as templates look at how a content begins and ends.
    """
    content = chat[index]["content"]
    core = content.strip()
    middle = content.index(core) + len(core) // 2
    head, tail = content[:middle], content[middle:]
    mark = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in text)  # private use
    pieces = render([*chat[:index], {**chat[index], "content": head + mark + tail}, *chat[index + 1 :]]).split(mark)
    spans = []
    if "".join(pieces) == text:
        for at in itertools.accumulate(len(piece) for piece in pieces[:-1]):
            # A template may strip either side.
            before = next((part for part in (head, head.lstrip()) if text.endswith(part, 0, at)), None)
            after = next((part for part in (tail, tail.rstrip()) if text.startswith(part, at)), None)
            if before is not None and after is not None:
                spans.append((at - len(before), at + len(after)))
    if not spans or len(spans) < len(pieces) - 1:
        raise ValueError(
            f"{name} ({chat[index]['role']}) is not found in the rendered chat: the template does not print its "
            "content as it is"
        )
    return spans
