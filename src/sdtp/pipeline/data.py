"""Examples (prompt, response) to a tokenised dataset on disk, with a manifest that says what is in it."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sdtp.errors import UserError
from sdtp.pipeline.config import DataSettings, Source
from sdtp.pipeline.corpus import Corpus, read_corpus, split_documents
from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.files import atomic_folder, canonical_json
from sdtp.pipeline.prompts import beginning, encode, encode_after, message_ids
from sdtp.pipeline.records import Record, Records, read_records
from sdtp.pipeline.tasks import Example, continuation_examples, retrieval_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "heldout", "test")
# Longest prompt any table of ours reports: the benchmark cuts its prompts from one text of at most this many tokens.
BENCHMARK_TOKENS = 131_072
# Answers written by people can be as long as documents; a loss over their first tokens says enough.
MAX_RESPONSE_TOKENS = 256


@dataclass(frozen=True)
class _Split:
    """One split before it is written: its rows, what the manifest says of their origin, and text for the benchmark."""

    examples: list[Example]
    origin: dict[str, Any]


def build_dataset(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, seed: int, output: str | Path
) -> dict[str, Any]:
    """Writes `train`, `heldout` and `test` (save_to_disk), manifest.json and benchmark.json into folder `output`.

    A `package` source is a corpus: training gets half retrieval, half continuation, testing `examples` of each, from
    different documents, phrasings and kinds of value. Other sources hold records, which become task `instruction`;
    where training and testing name the same source, their records are disjoint.

    Args:
        tokenizer: the model's; its chat template shapes the prompts.
        settings: the config block `data`; `max_tokens` limits prompt tokens, template included.
        seed: of every random choice; the split of a corpus' documents does not depend on it.
        output: the folder, replaced as a whole.

    Returns:
        The manifest.

    Raises:
        UserError: a source is missing, malformed, too small, or not what its pinned sha256 says.
    """
    test_is_train = _identity(settings.test.source) == _identity(settings.train.source)
    trained = _read(settings.train.source, "data.train.source")
    tested = trained if test_is_train else _read(settings.test.source, "data.test.source")
    _verify(trained, settings.train.source, "data.train.source")
    _verify(tested, settings.test.source, "data.test.source")
    counts = {"train": settings.train.examples, "heldout": settings.train.heldout, "test": settings.test.examples}
    splits: dict[str, _Split] = {}
    for split in SPLITS:
        content, source = (tested, settings.test.source) if split == "test" else (trained, settings.train.source)
        if isinstance(content, Corpus):
            splits[split] = _corpus_split(tokenizer, content, source, split, counts[split], settings, seed)
        else:
            before = {"train": 0, "heldout": counts["train"], "test": counts["train"] + counts["heldout"]}[split]
            if split == "test" and not test_is_train:
                before = 0
            splits[split] = _record_split(
                tokenizer, content, source, split, before, counts[split], settings.max_tokens, seed
            )
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
    benchmark = _benchmark_ids(tokenizer, tested)
    with atomic_folder(output) as folder:
        for split, part in splits.items():
            _to_dataset(part.examples).save_to_disk(str(folder / split))
        (folder / "benchmark.json").write_text(canonical_json({"source": settings.test.source.ref, "ids": benchmark}))
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def load_split(data_dir: str | Path, split: str) -> Dataset:
    """One split of a data folder: columns id, task, prompt_ids, response_ids, prompt, response, source.

    Raises:
        UserError: no such split, or the folder is not one `build_dataset` made.
    """
    from datasets import load_from_disk

    folder = Path(data_dir) / split
    if split not in SPLITS or not folder.is_dir():
        raise UserError(f"{folder}: no such split; a folder made by `sdtp data` has {', '.join(SPLITS)}")
    return load_from_disk(str(folder))


def benchmark_prompt(data_dir: str | Path, tokens: int) -> list[int]:
    """The first `tokens` ids of the benchmark's text: documents of the test split, one after the other.

    Raises:
        UserError: the text is shorter.
    """
    path = Path(data_dir) / "benchmark.json"
    ids = json.loads(path.read_text())["ids"]
    if not 0 < tokens <= len(ids):
        raise UserError(f"benchmark.prompt_tokens: {tokens} is not in 1..{len(ids)}, the tokens of {path}")
    return list(ids[:tokens])


def _identity(source: Source) -> tuple[str, str, str | None]:
    return source.kind, source.ref, source.revision


def _read(source: Source, key: str) -> Corpus | Records:
    return read_corpus(source.ref) if source.kind == "package" else read_records(source, key)


def _verify(content: Corpus | Records, source: Source, key: str) -> None:
    if source.sha256 is None or source.sha256 == content.sha256:
        return
    if content.sha256 is None:
        raise UserError(f"{key}.sha256: {source.sha256} cannot be checked for a hub source; pin its revision instead")
    raise UserError(f"{key}.sha256: expected {source.sha256}, found {content.sha256} for {source.ref}")


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
        "source": {"kind": source.kind, "ref": source.ref, "version": corpus.version, "sha256": corpus.sha256},
        "licence": corpus.licence,
        "documents": len(documents),
        "phrasings": [phrasing.name for phrasing in vocabulary.phrasings],
        "value_types": [value_type.kind for value_type in vocabulary.value_types],
    }
    return _Split(examples, origin)


def _alternate(first: Iterable[Example], second: Iterable[Example]) -> Iterator[Example]:
    """Tasks in turn, so that any first few examples hold both; what one has more of comes at the end."""
    for pair in zip_longest(first, second):
        yield from (example for example in pair if example is not None)


def _record_split(
    tokenizer: PreTrainedTokenizerBase,
    content: Records,
    source: Source,
    split: str,
    before: int,
    count: int,
    max_tokens: int,
    seed: int,
) -> _Split:
    """Records `before`...`before + count` of the source in an order shuffled by `seed`."""
    chosen = list(content.records)
    random.Random(f"{seed}/records").shuffle(chosen)
    chosen = chosen[before : before + count]
    if len(chosen) < count:
        raise UserError(
            f"data: {count} {split} examples asked after {before} for other splits, "
            f"but {source.ref} has {len(content.records)} usable records of {content.total}"
        )
    examples, cut = [], Counter({"prompts_cut": 0, "prompt_tokens_cut": 0, "responses_cut": 0})
    for record in tqdm(chosen, desc=f"{split} instruction", unit="example"):
        example, tokens_cut, response_cut = _record_example(tokenizer, record, split, max_tokens)
        examples.append(example)
        cut.update(prompts_cut=tokens_cut > 0, prompt_tokens_cut=tokens_cut, responses_cut=response_cut)
    origin = {
        "source": {"kind": source.kind, "ref": source.ref, "revision": content.revision, "sha256": content.sha256},
        "records": {"total": content.total, "usable": len(content.records), "skipped": content.skipped},
        **cut,
    }
    return _Split(examples, origin)


def _record_example(
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
