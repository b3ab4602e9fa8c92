"""Where the text of RULER-style tasks comes from: no document of training, no file that is not text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.corpus import read_corpus, split_documents
from sdtp.pipeline.files import sha256_files
from sdtp.pipeline.ruler.texts import read_documents

KEY = "suites.ruler.source"


def test_of_a_package_the_documents_kept_for_testing(corpus_package: Callable[..., Path]) -> None:
    corpus_package("speeches", {f"{year}-x-1": f"The year is {year}." for year in range(1900, 1920)})
    corpus = read_corpus("speeches")
    found, sha256 = read_documents(Source("package", "speeches", None, None), KEY)
    splits = split_documents(corpus.documents)
    assert found == splits["test"]
    assert len(found) == 6
    assert not {document.name for document in found} & {document.name for document in splits["train"]}
    assert sha256 == corpus.sha256


def test_of_a_folder_all_text_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes(b"\xef\xbb\xbfTwo words.")
    (tmp_path / "a.txt").write_text("One word.")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "c.md").write_text("No.")
    (tmp_path / ".hidden" / "d.txt").write_text("No.")
    found, sha256 = read_documents(Source("local", str(tmp_path), None, None), KEY)
    assert [(document.name, document.text) for document in found] == [("a", "One word."), ("b/two", "Two words.")]
    assert sha256 == sha256_files(tmp_path, [tmp_path / name for name in ("a.txt", "b/two.txt", "blank.txt")])
    assert read_documents(Source("local", str(tmp_path), None, sha256), KEY)[1] == sha256
    with pytest.raises(UserError, match=rf"suites\.ruler\.source\.sha256: expected {'0' * 64}, found {sha256}"):
        read_documents(Source("local", str(tmp_path), None, "0" * 64), KEY)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suites\.ruler\.source\.ref: .* is no folder with \.txt files"):
        read_documents(Source("local", str(tmp_path), None, None), KEY)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: .* text in UTF-8 is needed"):
        read_documents(Source("local", str(tmp_path), None, None), KEY)
    with pytest.raises(
        UserError, match=r"suites\.ruler\.source\.kind: 'hub' holds no documents; accepted: local, pack"
    ):
        read_documents(Source("hub", "a/b", None, None), KEY)
