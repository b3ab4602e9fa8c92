"""Examples (prompt, response) to tokenised datasets on disk, each with a manifest that says what is in it."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.config import DataSettings
from sdtp.pipeline.corpus import Corpus, read_corpus, split_documents
from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.files import atomic_folder, canonical_json, write_atomically
from sdtp.pipeline.instructions import MAX_RESPONSE_TOKENS, instruction_examples, normal
from sdtp.pipeline.prompts import beginning, encode_after
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.records import Records, read_records
from sdtp.pipeline.rows import read_saved
from sdtp.pipeline.tasks import CONTINUATION_TOKENS, Example, continuation_examples, retrieval_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What a pruner learns from, and by what it is seen how well; what its quality is measured on.
TRAINING, TEST_SPLIT = ("train", "heldout"), "test"
SPLITS = (*TRAINING, TEST_SPLIT)
# Longest prompt any table of ours reports: the benchmark cuts its prompts from one text of at most this many tokens.
BENCHMARK_TOKENS = 131_072


@dataclass(frozen=True)
class _Split:
    """One split before it is written: its rows, and what the manifest says of their origin."""

    examples: list[Example]
    origin: dict[str, Any]


def build_training_data(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, seed: int, output: str | Path
) -> dict[str, Any]:
    """Writes `train` and `heldout` (save_to_disk) and manifest.json into folder `output`.

    A `package` source is a corpus: half the examples are retrieval, half continuation. Other sources hold records,
    which become task `instruction`; one whose prompt is in an earlier split is left out. Malformed rows are left out or
    refused as `settings.malformed` says (see `read_records`).

    The manifest has for each split `rows`: of `n_total` rows of its source (examples made, for a corpus) `n_skipped`
    were malformed, `n_used` are in the split, and `n_left` in an earlier one or not asked for.

    Args:
        tokenizer: the model's; its chat template shapes the prompts.
        settings: the config block `data`, without `test`; `max_tokens` limits prompt tokens, template included.
        seed: of every random choice; the split of a corpus' documents does not depend on it.
        output: the folder, replaced as a whole.

    Returns:
        The manifest.

    Raises:
        UserError: the source is missing, malformed, too small, or not what its pinned sha256 says.
    """
    content = _read_and_tell(settings.train.source, "data.train.source", settings.malformed)
    counts = {"train": settings.train.examples, "heldout": settings.train.heldout}
    splits: dict[str, _Split] = {}
    used: set[str] = set()
    for split in TRAINING:
        splits[split] = _split(tokenizer, content, settings.train.source, split, counts[split], settings, seed, used)
        used |= {normal(example.prompt) for example in splits[split].examples}
    return _write(tokenizer, splits, settings, seed, output)


def build_test_data(
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    seed: int,
    output: str | Path,
    learned_from: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Writes `test` and manifest.json into folder `output`, as `build_training_data` does.

    Of a corpus, `settings.test.examples` of retrieval and as many of continuation, from other documents, phrasings and
    kinds of value than those of training; of records, those whose prompt is in no split of `learned_from`, whatever
    files the two come from.

    Args:
        tokenizer, seed, output: see `build_training_data`.
        settings: the config block `data`, without `train`.
        learned_from: folders that `build_training_data` made; what corpora give does not depend on them.

    Returns:
        The manifest.

    Raises:
        UserError: see `build_training_data`.
    """
    source = settings.test.source
    content = _read_and_tell(source, "data.test.source", settings.malformed)
    learned = (load_split(data, split)["prompt"] for data in learned_from for split in TRAINING)
    used = {normal(prompt) for prompts in learned for prompt in prompts}
    made = _split(tokenizer, content, source, TEST_SPLIT, settings.test.examples, settings, seed, used)
    return _write(tokenizer, {TEST_SPLIT: made}, settings, seed, output)


def _split(
    tokenizer: PreTrainedTokenizerBase,
    content: Corpus | Records,
    source: Source,
    split: str,
    count: int,
    settings: DataSettings,
    seed: int,
    used: Set[str],
) -> _Split:
    if isinstance(content, Corpus):
        return _corpus_split(tokenizer, content, source, split, count, settings, seed)
    return _record_split(tokenizer, content, source, split, count, settings, seed, used)


def _write(
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, _Split],
    settings: DataSettings,
    seed: int,
    output: str | Path,
) -> dict[str, Any]:
    """Write a data folder; returns its manifest."""
    described = {split: _describe(part) for split, part in splits.items()}
    manifest = {
        "seed": seed,
        "max_tokens": settings.max_tokens,
        "distractors": settings.distractors,
        "chat_template_sha256": _sha256_text(tokenizer.chat_template) if tokenizer.chat_template else None,
        "chat_template_tasks": ["retrieval", "instruction"] if tokenizer.chat_template else [],
        "content_sha256": _sha256_text("".join(part["content_sha256"] for part in described.values())),
        "splits": described,
    }
    with atomic_folder(output) as folder:
        for split, part in splits.items():
            _to_dataset(part.examples).save_to_disk(str(folder / split))
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def load_split(data_dir: str | Path, split: str) -> Dataset:
    """One split of a data folder: columns id, task, prompt_ids, response_ids, prompt, response, source.

    Raises:
        UserError: the folder has no such split.
    """
    folder = Path(data_dir) / split
    if split not in SPLITS or not folder.is_dir():
        raise UserError(
            f"{folder}: no such split; a folder of `sdtp data` has {' and '.join(TRAINING)}, one of `sdtp test-data` "
            f"has {TEST_SPLIT}"
        )
    return read_saved(folder)


def split_hash(data_dir: str | Path, split: str) -> str:
    """The content hash of one split, from the manifest of its data folder."""
    return str(read_json(Path(data_dir) / "manifest.json")["splits"][split]["content_sha256"])


def longest_response(source: Source) -> int:
    """Most tokens that an example's response adds to its prompt; a planted value is shorter than a continuation."""
    return CONTINUATION_TOKENS if source.kind == "package" else MAX_RESPONSE_TOKENS


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
    source = settings.test.source
    ids = _benchmark_ids(tokenizer, _read(source, "data.test.source", settings.malformed))
    with write_atomically(Path(output)) as temporary:
        temporary.write_text(canonical_json({"source": source.ref, "ids": ids}), encoding="utf-8")
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
    source = settings.test.source
    available = len(_benchmark_ids(tokenizer, _read(source, "data.test.source", settings.malformed)))
    for length in lengths:
        _check_length(length, available, f"the benchmark's text, made of data.test.source {source.ref}")
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


def _read(source: Source, key: str, malformed: str) -> Corpus | Records:
    content = read_corpus(source.ref) if source.kind == "package" else read_records(source, key, malformed)
    if isinstance(content, Records) and not content.total:
        raise UserError(f"{key}.ref: {source.ref} has no rows; at least one is needed")
    if source.sha256 is None or source.sha256 == content.sha256:
        return content
    if content.sha256 is None:
        raise UserError(f"{key}.sha256: {source.sha256} cannot be checked for a hub source; pin its revision instead")
    raise UserError(f"{key}.sha256: expected {source.sha256}, found {content.sha256} for {source.ref}")


def _read_and_tell(source: Source, key: str, malformed: str) -> Corpus | Records:
    """As `_read`, with warnings of the rows that were left out or repaired."""
    content = _read(source, key, malformed)
    if isinstance(content, Records):
        for what, tally in (("left out", content.skipped), ("repaired", content.repaired)):
            for reason, places in tally.first.items():
                count = f"{tally.counts[reason]} of {content.total} rows {what}, {reason}"
                more = "; ..." if tally.counts[reason] > len(places) else ""
                logger.warning("%s: %s: %s%s", key, count, "; ".join(places), more)
    return content


def _corpus_split(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    source: Source,
    split: str,
    count: int,
    settings: DataSettings,
    seed: int,
) -> _Split:
    documents = split_documents(corpus.documents)[split]
    vocabulary = TEST if split == "test" else TRAIN
    retrievals, continuations = (count, count) if split == "test" else (count - count // 2, count // 2)
    retrieval = retrieval_examples(
        tokenizer,
        documents,
        vocabulary,
        count=retrievals,
        distractors=settings.distractors,
        max_tokens=settings.max_tokens,
        split=split,
        seed=seed,
    )
    continuation = continuation_examples(
        tokenizer, documents, count=continuations, max_tokens=settings.max_tokens, split=split, seed=seed
    )
    examples = list(
        tqdm(
            _alternate(retrieval, continuation),
            desc=f"{split} examples",
            unit="example",
            total=retrievals + continuations,
        )
    )
    origin = {
        "rows": _rows(len(examples), 0, len(examples)),
        "source": {"kind": source.kind, "ref": source.ref, "version": corpus.version, "sha256": corpus.sha256},
        "licence": corpus.licence,
        "documents": len(documents),
        "phrasings": [phrasing.name for phrasing in vocabulary.phrasings],
        "value_types": [value_type.kind for value_type in vocabulary.value_types],
    }
    return _Split(examples, origin)


def _alternate(first: Iterable[Example], second: Iterable[Example]) -> Iterator[Example]:
    """Tasks in turn, so that any first few examples hold both; what one has more of comes at the end."""
    for pair in itertools.zip_longest(first, second):
        yield from (example for example in pair if example is not None)


def _record_split(
    tokenizer: PreTrainedTokenizerBase,
    content: Records,
    source: Source,
    split: str,
    count: int,
    settings: DataSettings,
    seed: int,
    used: Set[str],
) -> _Split:
    examples, counts = instruction_examples(
        tokenizer,
        content,
        used,
        count=count,
        max_tokens=settings.max_tokens,
        split=split,
        seed=seed,
        malformed=settings.malformed,
    )
    origin = {
        "source": {"kind": source.kind, "ref": source.ref, "revision": content.revision, "sha256": content.sha256},
        "rows": _rows(content.total, content.skipped.counts.total(), len(examples)),
        "skipped": dict(content.skipped.counts),
        "repaired": dict(content.repaired.counts),
        "first_malformed": {**content.skipped.first, **content.repaired.first},
        **counts,
    }
    return _Split(examples, origin)


def _rows(total: int, skipped: int, used: int) -> dict[str, int]:
    return {"n_total": total, "n_skipped": skipped, "n_used": used, "n_left": total - skipped - used}


def _benchmark_ids(tokenizer: PreTrainedTokenizerBase, content: Corpus | Records) -> list[int]:
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


def _to_dataset(examples: list[Example]) -> Dataset:
    from datasets import Dataset, Features, List, Value

    ids = List(Value("int32"))
    text = Value("string")
    features = Features(
        {
            "id": text,
            "task": text,
            "prompt_ids": ids,
            "response_ids": ids,
            "prompt": text,
            "response": text,
            "source": text,
        }
    )
    # Column by column: rows would leave an empty split without columns.
    return Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in features}, features)


def _describe(part: _Split) -> dict[str, Any]:
    """The manifest's entry of one split; `content_sha256` is over all columns of all rows, in order."""
    lengths = [len(example.prompt_ids) for example in part.examples]
    digest = hashlib.sha256()
    for example in part.examples:
        digest.update(canonical_json(asdict(example)).encode() + b"\n")
    return {
        "examples": len(part.examples),
        "tasks": dict(Counter(example.task for example in part.examples)),
        "prompt_tokens": {"min": min(lengths, default=0), "max": max(lengths, default=0)},
        "content_sha256": digest.hexdigest(),
        **part.origin,
    }


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
