"""Whether a GGUF file is whole: its sizes and counts are checked before a reader believes them.

The readers take a count of 2^60 in a file of a kilobyte at its word, and fill the memory. Layout: the GGUF
specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from sdtp.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Bytes of the plain types of values, by their number; 8 is a text and 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_INTEGERS = {4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_MOST_DIMENSIONS = 4


def check_gguf(path: Path) -> None:
    """Read the header of a GGUF file, and see that all it speaks of is in the file.

    Raises:
        UserError: it is no GGUF file, of a version that is not known, or cut off; it does not say what sizes its model
            has, or has fewer weights than such a model, whose others would be drawn at random.
    """
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise UserError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
        _Header(path, file).check()


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._numbers: dict[str, int] = {}
        self._architecture = ""

    def check(self) -> None:
        version = self._number("<I", "its version")
        if version not in _VERSIONS:
            raise UserError(f"{self._path}: GGUF version {version} is not known; accepted: 2 and 3, little-endian")
        tensors, keys = self._number("<Q", "the number of tensors"), self._number("<Q", "the number of keys")
        for _ in range(keys):
            self._key()
        found = [self._tensor() for _ in range(tensors)]
        alignment = self._numbers.get("general.alignment", 32)
        if alignment < 1:
            raise UserError(f"{self._path}: general.alignment is {alignment}; at least 1 is needed")
        start = -(-self._file.tell() // alignment) * alignment
        for name, _, end in found:
            if start + end > self._size:
                raise self._cut_off(f"tensor {name}")
        self._check_sizes(sum(elements for _, elements, _ in found))

    def _check_sizes(self, elements: int) -> None:
        """Whether the weights are as many as the feed-forward layers alone need."""
        layers, hidden, inner = (
            self._size_of(name) for name in ("block_count", "embedding_length", "feed_forward_length")
        )
        if 2 * layers * hidden * inner > elements:
            raise UserError(
                f"{self._path}: its tensors have {elements} weights; {layers} layers of {hidden} and {inner} need more"
            )

    def _size_of(self, name: str) -> int:
        key = f"{self._architecture}.{name}"
        if self._numbers.get(key, 0) < 1:
            raise UserError(f"{self._path}: key {key} is {self._numbers.get(key)}; a size of the model is needed")
        return self._numbers[key]

    def _key(self) -> None:
        name = self._text("a key")
        what = f"key {name}"
        kind = self._number("<I", what)
        if kind in _INTEGERS:
            self._numbers[name] = self._number(_INTEGERS[kind], what)
        elif kind == _STRING and name == "general.architecture":
            self._architecture = self._text(what)
        else:
            self._skip_value(kind, what)

    def _tensor(self) -> tuple[str, int, int]:
        """Its name, its number of weights, and where it ends, counted from where the first may begin."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text("a tensor")
        dimensions = self._number("<I", f"tensor {name}")
        if dimensions > _MOST_DIMENSIONS:
            raise UserError(f"{self._path}: tensor {name} has {dimensions} dimensions; there are {_MOST_DIMENSIONS}")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("<Q", f"tensor {name}")
        kind, offset = self._number("<I", f"tensor {name}"), self._number("<Q", f"tensor {name}")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            raise UserError(f"{self._path}: tensor {name} is of type {kind}, which is not known") from None
        return name, elements, offset + -(-elements // block) * size

    def _skip_value(self, kind: int, what: str) -> None:
        if kind == _STRING:
            self._skip(self._number("<Q", what), what)
        elif kind == _ARRAY:
            inner, count = self._number("<I", what), self._number("<Q", what)
            if inner in _SIZES:
                self._skip(count * _SIZES[inner], what)
            elif inner == _STRING:
                for _ in range(count):
                    self._skip(self._number("<Q", what), what)
            else:
                raise UserError(f"{self._path}: {what} is an array of type {inner}; numbers and texts are accepted")
        elif kind in _SIZES:
            self._skip(_SIZES[kind], what)
        else:
            raise UserError(f"{self._path}: {what} is of type {kind}, which is not known")

    def _number(self, form: str, what: str) -> int:
        data = self._file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise self._cut_off(what)
        (number,) = struct.unpack(form, data)
        return int(number)

    def _text(self, what: str) -> str:
        length = self._number("<Q", what)
        self._fits(length, what)
        return self._file.read(length).decode("utf-8", errors="replace")

    def _skip(self, length: int, what: str) -> None:
        self._fits(length, what)
        self._file.seek(length, os.SEEK_CUR)

    def _fits(self, length: int, what: str) -> None:
        if length > self._size - self._file.tell():
            raise self._cut_off(what)

    def _cut_off(self, what: str) -> UserError:
        return UserError(f"{self._path} is cut off: {what} goes beyond its {self._size} bytes")
