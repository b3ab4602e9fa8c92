"""Examples of a task at a length: what the model is given, and what counts as an answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sdtp.errors import UserError
from sdtp.evaluation.ruler.tasks import PART_MATCH, RulerExample
from sdtp.pipeline.corpus import Document, running_text
from sdtp.pipeline.prompts import encode
from sdtp.pipeline.ruler import needles, questions, variables, words
from sdtp.pipeline.ruler.layout import Draft, Sheet
from sdtp.pipeline.ruler.profiles import Passage
from sdtp.pipeline.ruler.settings import check
from sdtp.pipeline.target_settings import RulerSettings
from sdtp.pipeline.tasks import document_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A reply may be twice as long as its references: enough for words between them, too little to list everything.
_REPLY = 2
_SHORTEST_REPLY = 32


def ruler_examples(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    settings: RulerSettings,
    *,
    task: str,
    length: int,
    count: int,
    seed: int,
    passages: Sequence[Passage] | None = None,
) -> Iterator[RulerExample]:
    """`count` examples whose prompts have `length` tokens, chat template and the beginning of the reply included.

    For the same settings and documents every example is a function of (seed, task, length, its number). The chat
    template is used where the tokenizer has one, and the beginning-of-sequence token stands once at most. Only lists of
    words can be a few tokens shorter, where no choice of words adds up to the length.

    Args:
        tokenizer: the model's.
        documents: the text that facts are planted in, and whose words are counted; not one the pruner was trained on.
        settings: how hard the tasks are.
        task: one of `settings.TASKS`.
        length: prompt tokens.
        count: examples; `single` plants at one depth after the other, so that a multiple of their number is even.
        seed: of every choice.
        passages: what `qa` asks about; None for invented people.

    Raises:
        UserError: an unknown task, a setting outside its range, a length too short for them, a text that is blank, too
            small or full of the answers.
    """
    check(settings, task)
    if not any(document.text.strip() for document in documents):
        raise UserError(
            f"suites.ruler.source: {len(documents)} documents without text; at least one with text is needed"
        )
    if task == "qa" and passages is not None:
        if not passages:
            raise UserError("suites.ruler.passages: there are none; at least one with a question is needed")
        passages = random.Random(f"{seed}/qa/passages").sample(passages, len(passages))
    listed = words.vocabulary(documents) if task == "common_words" else []
    order = document_order(documents, f"{seed}/{task}")
    for number in range(count):
        identifier = f"ruler-{task}-{length}-{number:05d}"
        rng = random.Random(f"{seed}/{identifier}")
        text = running_text(documents, order[number % len(order)], rng.random())
        sheet = Sheet(tokenizer, task, length, number, rng, text)
        yield _example(sheet, identifier, _draft(sheet, settings, listed, passages))


def _draft(sheet: Sheet, settings: RulerSettings, listed: Sequence[str], passages: Sequence[Passage] | None) -> Draft:
    match sheet.task:
        case "single":
            return needles.single(sheet, settings)
        case "multi_key":
            return needles.multi_key(sheet, settings)
        case "multi_value":
            return needles.multi_value(sheet, settings)
        case "multi_query":
            return needles.multi_query(sheet, settings)
        case "variables":
            return variables.variables(sheet, settings)
        case "common_words":
            return words.common_words(sheet, settings, listed)
        case "frequent_words":
            return words.frequent_words(sheet)
        case _:
            return questions.qa(sheet, settings, passages)


def _example(sheet: Sheet, identifier: str, draft: Draft) -> RulerExample:
    asking = draft.asking
    references = list(asking.references)
    reply = max(references, key=len) if sheet.task in PART_MATCH else ", ".join(references)
    body = [token for _, ids in draft.body for token in ids]
    before = len(asking.frame.head)
    return RulerExample(
        id=identifier,
        task=sheet.task,
        length=sheet.length,
        depth=draft.depth,
        prompt_ids=asking.frame.head + body + asking.frame.tail,
        context=(before, before + len(body)),
        prompt=asking.opening + "".join(text for text, _ in draft.body) + asking.closing,
        references=references,
        max_new_tokens=max(_SHORTEST_REPLY, _REPLY * len(encode(sheet.tokenizer, reply))),
        chat=sheet.tokenizer.chat_template is not None,
        source="+".join(draft.sources),
    )
