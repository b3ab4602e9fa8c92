"""The text that RULER-style tasks are written over: documents that no pruner was trained on."""

from __future__ import annotations

from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.corpus import Document, read_corpus, split_documents
from sdtp.pipeline.files import sha256_files


def read_documents(source: Source, key: str) -> tuple[list[Document], str]:
    """The documents of a source and the checksum of all its files.

    Args:
        source: `package`, a distribution that ships `.txt` files, of which those of the test split are taken, whatever
            the training reads; or `local`, a folder with `.txt` files in UTF-8, hidden ones left out, all of which are.
        key: its config key, for messages.

    Raises:
        UserError: another kind; no such package or folder, or without text; not what its sha256 says.
    """
    if source.kind == "package":
        corpus = read_corpus(source.ref)
        documents, sha256 = split_documents(corpus.documents)["test"], corpus.sha256
    elif source.kind == "local":
        documents, sha256 = _folder(Path(source.ref), key)
    else:
        raise UserError(f"{key}.kind: {source.kind!r} holds no documents; accepted: local, package")
    if source.sha256 not in (None, sha256):
        raise UserError(f"{key}.sha256: expected {source.sha256}, found {sha256} for {source.ref}")
    return documents, sha256


def _folder(folder: Path, key: str) -> tuple[list[Document], str]:
    paths = [
        path
        for path in sorted(folder.rglob("*.txt"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise UserError(f"{key}.ref: {str(folder)!r} is no folder with .txt files; at least one is needed")
    documents = []
    for path in paths:
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {error}; text in UTF-8 is needed") from error
        name = path.relative_to(folder).with_suffix("").as_posix()
        if text.strip():
            documents.append(Document(name, name, text))
    return documents, sha256_files(folder, paths)
