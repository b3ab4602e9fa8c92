"""The text that benchmarks cut their prompts from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sdtp.errors import UserError
from sdtp.pipeline.config import DataSettings
from sdtp.pipeline.corpus import Corpus, split_documents
from sdtp.pipeline.data_source import read_source
from sdtp.pipeline.files import canonical_json, write_atomically
from sdtp.pipeline.prompts import beginning, encode_after
from sdtp.pipeline.reading import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longest prompt any table of ours reports: the benchmark cuts its prompts from one text of at most this many tokens.
BENCHMARK_TOKENS = 131_072


def write_benchmark_text(tokenizer: PreTrainedTokenizerBase, settings: DataSettings, output: str | Path) -> int:
    """Writes the text that benchmarks cut their prompts from: documents of the test split, one after the other.

    Args:
        tokenizer: the model's.
        settings: `test.source`, and `malformed` for records.
        output: a JSON file.

    Returns:
        Its tokens, at most `BENCHMARK_TOKENS`.

    Raises:
        UserError: the source is missing, malformed, or not what its pinned sha256 says.
    """
    ids = _text_ids(tokenizer, settings)
    with write_atomically(Path(output)) as temporary:
        temporary.write_text(canonical_json({"source": settings.test.source.ref, "ids": ids}), encoding="utf-8")
    return len(ids)


def check_benchmark_text(tokenizer: PreTrainedTokenizerBase, settings: DataSettings, lengths: Iterable[int]) -> int:
    """Checks benchmarked lengths against the text that `write_benchmark_text` will write.

    Args:
        tokenizer, settings: as it takes them.
        lengths: of `benchmark.prompt_tokens`.

    Returns:
        The text's tokens, of which no more than `BENCHMARK_TOKENS` are kept.

    Raises:
        UserError: the text is shorter than one of the lengths, or see `write_benchmark_text`.
    """
    available = len(_text_ids(tokenizer, settings))
    for length in lengths:
        _check_length(length, available, f"the benchmark's text, made of data.test.source {settings.test.source.ref}")
    return available


def benchmark_prompt(text: str | Path, tokens: int) -> list[int]:
    """The first `tokens` ids of the benchmark's text, a file of `write_benchmark_text`.

    Raises:
        UserError: the text is shorter.
    """
    ids = read_json(Path(text))["ids"]
    _check_length(tokens, len(ids), str(text))
    return list(ids[:tokens])


def _check_length(tokens: int, available: int, text: str) -> None:
    if not 0 < tokens <= available:
        raise UserError(f"benchmark.prompt_tokens: {tokens} is not in 1..{available}, the tokens of {text}")


def request_prompts(text: str | Path, tokens: int, count: int) -> list[list[int]]:
    """`count` prompts of `tokens` ids: consecutive pieces of the benchmark's text, which starts over where it ends."""
    ids = itertools.cycle(read_json(Path(text))["ids"])
    return [list(itertools.islice(ids, tokens)) for _ in range(count)]


def _text_ids(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[int]:
    content = read_source(settings.test.source, "data.test.source", settings.malformed)
    if isinstance(content, Corpus):
        texts: Iterable[str] = (document.text for document in split_documents(content.documents)["test"])
    else:
        texts = (record.prompt for record in content.records)
    ids = beginning(tokenizer)
    for text in texts:
        ids += encode_after(tokenizer, "\n\n" + text.strip())
        if len(ids) >= BENCHMARK_TOKENS:
            break
    return ids[:BENCHMARK_TOKENS]
