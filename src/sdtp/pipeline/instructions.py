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
from sdtp.pipeline.records import Record, Records, Tally
from sdtp.pipeline.tasks import COUNT_KEYS, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Answers written by people can be as long as documents; a loss over their first tokens says enough.
MAX_RESPONSE_TOKENS = 256


def instruction_examples(
    tokenizer: PreTrainedTokenizerBase,
    content: Records,
    used: Set[str],
    *,
    count: int,
    max_tokens: int,
    split: str,
    seed: int,
    malformed: str,
) -> tuple[list[Example], dict[str, Any]]:
    """The first `count` records, in an order shuffled by `seed`, whose prompts are not among `used`.

    Args:
        used: prompts of the splits made before this one, in `normal` form.
        max_tokens: most prompt tokens, template included; longer messages lose their middle.
        malformed: `fail` refuses a prompt that is too long, `skip` cuts it. Responses are cut either way: their first
            `MAX_RESPONSE_TOKENS` are what the loss is over.

    Returns:
        The examples, and what the manifest says of them: records that are `in_training` (left out, since a split before
        has their prompt), how many prompts and responses were cut and how many tokens of them, and which first.

    Raises:
        UserError: fewer than `count` records are left; a prompt is too long and `malformed` is `fail`; the tokenizer
            makes no token of a prompt or response.
    """
    order = list(content.records)
    random.Random(f"{seed}/records").shuffle(order)
    free = [record for record in order if normal(record.prompt) not in used]
    in_training = len(order) - len(free)
    if len(free) < count:
        raise UserError(
            f"{COUNT_KEYS[split]}: {count} records are asked for, but {len(free)} are left: {len(order)} of "
            f"{content.total} are usable, and {in_training} of these have a prompt that an earlier split has"
        )
    examples, cut = [], Tally()
    tokens = Counter({"prompt": 0, "response": 0})
    for record in tqdm(free[:count], desc=f"{split} instruction", unit="example"):
        example, tokens_cut = _example(tokenizer, record, split, max_tokens)
        if malformed == "fail" and tokens_cut["prompt"]:
            too_long = f"{tokens_cut['prompt']} tokens too long for data.max_tokens {max_tokens}"
            raise UserError(f"{record.where}: the prompt is {too_long}; data.malformed skip cuts out its middle")
        examples.append(example)
        tokens.update(tokens_cut)
        for part in (part for part, excess in tokens_cut.items() if excess):
            cut.add(part, f"{record.where}: {tokens_cut[part]} tokens of the {part}")
    counts = {f"{part}s_cut": cut.counts[part] for part in tokens}
    return examples, {
        "in_training": in_training,
        **counts,
        **{f"{part}_tokens_cut": excess for part, excess in tokens.items()},
        "first_cut": cut.first,
    }


def normal(prompt: str) -> str:
    """A prompt as it is compared with others: case, white space and the coding of accents make no difference."""
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def _example(
    tokenizer: PreTrainedTokenizerBase, record: Record, split: str, max_tokens: int
) -> tuple[Example, dict[str, int]]:
    """The example of a record, and how many tokens of its prompt and response were cut."""
    prompt_ids, prompt_tokens_cut = message_ids(tokenizer, record.prompt, max_tokens)
    if tokenizer.chat_template is None:
        response_ids = encode_after(tokenizer, "\n" + record.response)
    else:
        response_ids = encode(tokenizer, record.response)
    for part, ids in (("prompt", prompt_ids), ("response", response_ids)):
        if not ids:
            raise UserError(f"{record.where}: the tokenizer makes no token of the {part}; at least one is needed")
    example = Example(
        id=f"{split}-{record.id}",
        task="instruction",
        prompt_ids=prompt_ids,
        response_ids=response_ids[:MAX_RESPONSE_TOKENS],
        prompt=record.prompt,
        response=record.response,
        source=record.where,
    )
    return example, {"prompt": prompt_tokens_cut, "response": max(0, len(response_ids) - MAX_RESPONSE_TOKENS)}
