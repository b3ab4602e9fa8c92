"""LongBench's examples to prompt ids: template, chat template where a task has it, and a cut in the middle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdtp.errors import UserError
from sdtp.evaluation.longbench.tasks import Prompt, task
from sdtp.evaluation.longbench.templates import Template, parse
from sdtp.pipeline.longbench_data import Example
from sdtp.pipeline.prompts import beginning, context_between, cut_middle, encode, frame, message_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the official repository's folder of settings: a JSON object of a template a task.
TEMPLATES_FILE = "dataset2prompt.json"


def read_templates(folder: str | Path, tasks: Sequence[str]) -> dict[str, Template]:
    """The templates of some tasks from a folder with the official `dataset2prompt.json`.

    Raises:
        UserError: no such file; it is not a JSON object; a task has no template there, or not one `parse` takes.
    """
    path = Path(folder) / TEMPLATES_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a JSON object of a template a task is needed")
    try:
        texts = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: {error}; a JSON object of a template a task is needed") from error
    if not isinstance(texts, dict):
        raise UserError(f"{path}: it holds a {type(texts).__name__}; a JSON object of a template a task is needed")
    templates = {}
    for name in tasks:
        if not isinstance(texts.get(name), str):
            raise UserError(f"{path}: key {name!r} is {texts.get(name)!r}; a template with {{context}} is needed")
        try:
            templates[name] = parse(texts[name])
        except ValueError as error:
            raise UserError(f"{path}: key {name!r}: {error}") from None
    return templates


def longbench_prompt(
    tokenizer: PreTrainedTokenizerBase, example: Example, template: Template, max_tokens: int
) -> Prompt:
    """The ids of an example's prompt, at most `max_tokens` of them.

    Chat models are asked through their template, except in few-shot and code tasks, whose prompts are texts to be
    continued. The limit counts the template's tokens and the beginning-of-sequence token. What is longer loses its
    middle, as ids: half of the room goes to the beginning and half to the end. In the tasks that ask a question this
    end has to hold everything after the context; where a text is to be continued it may begin inside that text.

    (The official code cuts to the limit before the chat template is added, decodes and encodes again, so that its
    prompts can be longer than the limit.)

    Args:
        tokenizer: the model's.
        example: of any task.
        template: of that task.
        max_tokens: with the task's new tokens at most the model's context.

    Raises:
        UserError: the template asks for an input and the example's is blank; `max_tokens` has no room for a prompt, for
            the whole question, or for any of the context.
    """
    kind = task(example.task)
    if template.asks and not example.input.strip():
        raise UserError(
            f"{example.where}: field 'input' is {example.input!r}; the template of {kind.name} needs a text"
        )
    chat = kind.chat and tokenizer.chat_template is not None
    around = len(frame(tokenizer, chat=chat))
    room = max_tokens - around
    if room < 2:
        raise UserError(f"{max_tokens} tokens are no room for a prompt of {kind.name}: {around} are around it already")
    text, after = template.render(example.context, example.input)
    if chat:
        ids, cut = message_ids(tokenizer, text, max_tokens)
    else:
        inner = encode(tokenizer, text)
        ids, cut = beginning(tokenizer) + cut_middle(inner, room), max(0, len(inner) - room)
    end = room - room // 2
    asked = len(encode(tokenizer, after))
    if cut and kind.chat and asked > end:
        raise UserError(
            f"{example.where}: what comes after the context has {asked} tokens, the end of a prompt of {max_tokens} "
            f"tokens has room for {end}: the question would be cut"
        )
    before = text[: len(text) - len(after) - len(example.context)]
    start, stop = context_between(tokenizer, ids, before, after, chat=chat)
    if cut and start == stop:
        raise UserError(
            f"{example.where}: a prompt of {max_tokens} tokens has room for none of the context: what comes before and "
            "after it fills them"
        )
    return Prompt(example.id, example.task, ids, (start, stop), cut, chat)
