"""What a saliency step has computed so far, on disk: whole chunks that a killed step goes on from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sdtp.disk import other_states, state_folder
from sdtp.errors import UserError
from sdtp.pipeline.shards import map_labels, write_labels

logger = logging.getLogger(__name__)

# Examples that a kill can cost, and that are in memory at a time: seconds of a GPU, a minute or two of two cores, while
# a file on its way to the disk takes milliseconds.
CHUNK_EXAMPLES = 16

_FINGERPRINT = "fingerprint"


def chunked(batches: Sequence[Sequence[int]], examples: int = CHUNK_EXAMPLES) -> Iterator[list[Sequence[int]]]:
    """Batches in their order, cut into chunks of at least `examples` examples each, but for the last."""
    chunk: list[Sequence[int]] = []
    for batch in batches:
        chunk.append(batch)
        if sum(map(len, chunk)) >= examples:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Chunks:
    """A folder of label files `chunk-<number>.safetensors`, outside the step's outputs, which a rerun starts without.

    Those of other fingerprints have folders of their own beside it: a setting changed and changed back costs nothing.

    Args:
        folder: of one shard; made where missing.
        fingerprint: hash of all that decides the labels and how they are cut into chunks, in hexadecimal; files with
            another one are never taken.
        shapes: per chunk the labels' shape, [stages, prompt_tokens], by example id.

    Attributes:
        whole: numbers of the chunks that are on disk, whole and with the right examples.
    """

    def __init__(self, folder: Path, fingerprint: str, shapes: Sequence[Mapping[str, tuple[int, int]]]) -> None:
        self._shard = folder
        self._folder = state_folder(folder, fingerprint)
        self._fingerprint = fingerprint
        self._shapes = shapes
        self.whole: set[int] = set()
        numbers = {self._path(number): number for number in range(len(shapes))}
        removed = 0
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path in numbers and self._is_whole(path, shapes[numbers[path]]):
                self.whole.add(numbers[path])
            else:
                path.unlink()
                removed += 1
        if removed:
            logger.info("%s: removed %d files, half-written or damaged", self._folder, removed)
        if other_states(self._folder):
            logger.info(
                "%s has chunks of other settings, inputs, code or library versions: they are not taken, and stay until "
                "the shard is whole",
                folder,
            )

    def add(self, number: int, labels: Mapping[str, torch.Tensor]) -> None:
        """Write a chunk; a crash leaves all of it or nothing."""
        write_labels(self._path(number), labels, {_FINGERPRINT: self._fingerprint})
        self.whole.add(number)

    def labels(self) -> dict[str, torch.Tensor]:
        """Every chunk's labels by example id: views of mapped files, read from the disk when they are used.

        Raises:
            UserError: a chunk is missing, or was damaged since it was written.
        """
        return {
            name: label
            for number in range(len(self._shapes))
            for name, label in map_labels(self._path(number))[1].items()
        }

    def clear(self) -> None:
        """Remove the shard's folder, those of other fingerprints included."""
        shutil.rmtree(self._shard, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"chunk-{number:06d}.safetensors"

    def _is_whole(self, path: Path, shapes: Mapping[str, tuple[int, int]]) -> bool:
        try:
            described, labels = map_labels(path)
        except UserError as error:
            logger.warning("%s", error)
            return False
        found = {name: tuple(label.shape) for name, label in labels.items()}
        return described.get(_FINGERPRINT) == self._fingerprint and found == shapes
