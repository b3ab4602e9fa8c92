"""The task made from records: an instruction, and the response somebody wrote to it."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Set
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.errors import UserError
from sdtp.pipeline.prompts import encode, encode_after, message_ids
from sdtp.pipeline.records import Record, Records
from sdtp.pipeline.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Answers written by people can be as long as documents; a loss over their first tokens says enough.
MAX_RESPONSE_TOKENS = 256
# Which config key says how many examples a split has.
_COUNT_KEYS = {"train": "data.train.examples", "heldout": "data.train.heldout", "test": "data.test.examples"}


def instruction_examples(
    tokenizer: PreTrainedTokenizerBase,
    content: Records,
    used: Set[str],
    *,
    count: int,
    max_tokens: int,
    split: str,
    seed: int,
) -> tuple[list[Example], dict[str, Any]]:
    """The first `count` records, in an order shuffled by `seed`, whose prompts are not among `used`.

    Args:
        used: prompts of the splits made before this one, in `normal` form.
        max_tokens: most prompt tokens, template included; longer messages lose their middle.

    Returns:
        The examples, and what the manifest says of them: records that are `in_training` (left out, since a split before
        has their prompt), and what was cut.

    Raises:
        UserError: fewer than `count` records are left.
    """
    order = list(content.records)
    random.Random(f"{seed}/records").shuffle(order)
    free = [record for record in order if normal(record.prompt) not in used]
    in_training = len(order) - len(free)
    if len(free) < count:
        raise UserError(
            f"{_COUNT_KEYS[split]}: {count} records are asked for, but {len(free)} are left: {len(order)} of "
            f"{content.total} are usable, and {in_training} of these have a prompt that an earlier split has"
        )
    examples, cut = [], Counter({"prompts_cut": 0, "prompt_tokens_cut": 0, "responses_cut": 0})
    for record in tqdm(free[:count], desc=f"{split} instruction", unit="example"):
        example, tokens_cut, response_cut = _example(tokenizer, record, split, max_tokens)
        examples.append(example)
        cut.update(prompts_cut=tokens_cut > 0, prompt_tokens_cut=tokens_cut, responses_cut=response_cut)
    return examples, {"in_training": in_training, **cut}


def normal(prompt: str) -> str:
    """A prompt as it is compared with others: case, white space and the coding of accents make no difference."""
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def _example(
    tokenizer: PreTrainedTokenizerBase, record: Record, split: str, max_tokens: int
) -> tuple[Example, int, bool]:
    prompt_ids, tokens_cut = message_ids(tokenizer, record.prompt, max_tokens)
    if tokenizer.chat_template is None:
        response_ids = encode_after(tokenizer, "\n" + record.response)
    else:
        response_ids = encode(tokenizer, record.response)
    example = Example(
        id=f"{split}-{record.id}",
        task="instruction",
        prompt_ids=prompt_ids,
        response_ids=response_ids[:MAX_RESPONSE_TOKENS],
        prompt=record.prompt,
        response=record.response,
        source=record.where,
    )
    return example, tokens_cut, len(response_ids) > MAX_RESPONSE_TOKENS
