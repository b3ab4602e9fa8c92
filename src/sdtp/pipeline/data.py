"""Examples (prompt, response) to tokenised datasets on disk, each with a manifest that says what is in it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.pipeline.block import Source
from sdtp.pipeline.config import DataSettings
from sdtp.pipeline.corpus import Corpus, split_documents
from sdtp.pipeline.data_folder import TEST_SPLIT, TRAINING, load_split
from sdtp.pipeline.data_source import read_and_tell
from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.files import atomic_folder, canonical_json
from sdtp.pipeline.instructions import MAX_RESPONSE_TOKENS, instruction_examples, normal
from sdtp.pipeline.records import Records
from sdtp.pipeline.tasks import CONTINUATION_TOKENS, Example, continuation_examples, retrieval_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
    content = read_and_tell(settings.train.source, "data.train.source", settings.malformed)
    splits: dict[str, _Split] = {}
    used: set[str] = set()
    for split in TRAINING:
        splits[split] = _split(tokenizer, content, split, settings, seed, used)
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
    content = read_and_tell(settings.test.source, "data.test.source", settings.malformed)
    learned = (load_split(data, split)["prompt"] for data in learned_from for split in TRAINING)
    used = {normal(prompt) for prompts in learned for prompt in prompts}
    made = {TEST_SPLIT: _split(tokenizer, content, TEST_SPLIT, settings, seed, used)}
    return _write(tokenizer, made, settings, seed, output)


def _split(
    tokenizer: PreTrainedTokenizerBase,
    content: Corpus | Records,
    split: str,
    settings: DataSettings,
    seed: int,
    used: Set[str],
) -> _Split:
    if split == TEST_SPLIT:
        source, count = settings.test.source, settings.test.examples
    else:
        source = settings.train.source
        count = settings.train.examples if split == "train" else settings.train.heldout
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


def longest_response(source: Source) -> int:
    """Most tokens that an example's response adds to its prompt; a planted value is shorter than a continuation."""
    return CONTINUATION_TOKENS if source.kind == "package" else MAX_RESPONSE_TOKENS


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
