"""A packaged corpus: found without import, split by group, read in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.corpus import Document, read_corpus, running_text, sentences, split_documents

Install = Callable[..., Path]


def test_documents_are_read_without_importing_the_package(corpus_package: Install) -> None:
    corpus_package("letters", {"1801-B-1": "Second.", "1800-A-1": "\ufeffFirst é.", "1802-C-1": "  \n"})
    corpus = read_corpus("letters")
    assert [(document.name, document.group, document.text) for document in corpus.documents] == [
        ("1800-A-1", "1800", "First é."),
        ("1801-B-1", "1801", "Second."),
    ]
    assert (corpus.version, corpus.licence) == ("1.5", "package: CC0-1.0")


def test_checksum_covers_names_and_bytes(corpus_package: Install) -> None:
    package = corpus_package("letters", {"1800-A-1": "One.", "1801-B-1": "Two."})
    before = read_corpus("letters").sha256
    expected = hashlib.sha256(b"1800-A-1.txt\x004\x00One." + b"1801-B-1.txt\x004\x00Two.").hexdigest()
    assert before == expected
    (package / "texts" / "1801-B-1.txt").write_text("Twp.")
    assert read_corpus("letters").sha256 != before


def test_packages_that_cannot_serve_are_refused_by_name(corpus_package: Install) -> None:
    with pytest.raises(UserError, match="'not-installed-anywhere' is not installed"):
        read_corpus("not-installed-anywhere")
    corpus_package("empty", {})
    with pytest.raises(UserError, match=r"'empty' ships no \.txt documents"):
        read_corpus("empty")


def test_a_group_is_never_in_two_splits() -> None:
    documents = [Document(f"{year}-{part}", str(year), "Text.") for year in range(100) for part in range(3)]
    splits = split_documents(documents)
    groups = {split: {document.group for document in members} for split, members in splits.items()}
    assert {split: len(found) for split, found in groups.items()} == {"train": 60, "heldout": 10, "test": 30}
    assert set.union(*groups.values()) == {str(year) for year in range(100)}
    assert sum(len(members) for members in splits.values()) == 300
    assert split_documents(documents[::-1])["test"] == splits["test"][::-1]
    with pytest.raises(UserError, match="too few for a heldout split"):
        split_documents(documents[:6])


def test_sentences_keep_every_word() -> None:
    document = Document("a", "a", 'We met Mr. Day.\n\n"So it is!"  Is it? No:\nit costs $1.50 today.')
    assert " ".join(sentences(document)) == " ".join(document.text.split())
    assert len(sentences(document)) >= 4


def test_running_text_goes_on_into_the_next_document_and_around() -> None:
    documents = [Document("a", "a", "A one. A two. A three. A four."), Document("b", "b", "B one.")]
    found = list(islice(running_text(documents, 0, 0.5), 5))
    assert found == [("a", "A three."), ("a", "A four."), ("b", "B one."), ("a", "A one."), ("a", "A two.")]
