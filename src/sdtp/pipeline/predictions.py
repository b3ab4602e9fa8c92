"""Predictions that are made once: each under a hash of all that decides it, in a file that is appended to.

The file lies outside a step's outputs, which are deleted before a rerun: an interrupted step goes on where it was, and
after a change of settings only what they decide is predicted again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

from sdtp.disk import naming
from sdtp.errors import UserError
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import digest, sha256_file, sha256_files, write_atomically
from sdtp.pipeline.libraries import LIBRARIES
from sdtp.pipeline.models import choose_dtype, read_manifest

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Blocks of settings that decide nothing about one answer: how many run together (but by rounding), which tasks and
# seeds there are.
_UNDECIDING = ("suites", "harness", "evaluation")


class Answer(TypedDict):
    """What a model made of a prompt; `kept_tokens` of the prompt are in the last layer's cache."""

    prediction: str
    kept_tokens: int


def model_digest(model: Path) -> str:
    """What identifies a model folder: its weights, configuration and tokenizer."""
    small = [path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt", ".py")]
    own = [path for path in small if path.name != "manifest.json"]
    return digest([read_manifest(model)["weights_sha256"], sha256_files(model, own)])


def pruner_digest(pruner: Path | None) -> str | None:
    """What identifies the folder of a trained pruner; None for none."""
    if pruner is None:
        return None
    return digest({path.name: sha256_file(path) for path in sorted(pruner.glob("pruner.*"))})


def what_decides(
    settings: Mapping[str, Any], model: Path, pruner: Path | None, method: str, keep_ratio: float, code: str
) -> dict[str, Any]:
    """All that decides an answer beside its prompt and seed, as a JSON value.

    Args:
        settings: as the step was given them.
        model: its folder.
        pruner: folder of the trained pruner, for what uses it.
        method, keep_ratio: what prunes.
        code: hash of the step's code.
    """
    return {
        "settings": {name: value for name, value in settings.items() if name not in _UNDECIDING},
        "dtype": str(choose_dtype(settings["model"]["dtype"], choose_device())),
        "model": model_digest(model),
        "pruner": pruner_digest(pruner),
        "method": method,
        "keep_ratio": keep_ratio,
        "code": code,
        "libraries": LIBRARIES,
    }


def keys(examples: Sequence[Mapping[str, Any]], made_from: Any, seed: int | None) -> list[str]:
    """Of each example the hash that its prediction stands under.

    Args:
        examples: with `task`, `prompt_ids` and `max_new_tokens`; nothing else of them counts.
        made_from: JSON value of all else that decides a prediction: model, pruner, method, settings, code.
        seed: of random choices, None for a method without.
    """
    common = digest([made_from, seed])
    return [digest([common, row["task"], row["max_new_tokens"], row["prompt_ids"]]) for row in examples]


class Predictions(Generic[T]):
    """Answers by hash, in a JSON-lines file.

    Lines that are no answers, such as the beginning of one that a killed process wrote, are removed when it is opened.

    Args:
        path: of the file, made with the first answer.
        kind: a typed dictionary of JSON values: what an answer has. A line with other keys is none.
        others: files of the same kind, which are read as well and never written.
    """

    def __init__(self, path: Path, kind: type[T], others: Collection[Path] = ()) -> None:
        self._path = path
        self._answers: dict[str, T] = {}
        for other in others:
            self._answers |= {key: answer for _, key, answer in _whole(_lines(other), kind)}
        lines = _lines(path)
        own = list(_whole(lines, kind))
        self._answers |= {key: answer for _, key, answer in own}
        if len(own) < len(lines):
            logger.info("%s: removed %d lines that are no predictions", path, len(lines) - len(own))
            with write_atomically(path) as temporary:
                temporary.write_bytes(b"".join(line for line, _, _ in own))

    def __contains__(self, key: str) -> bool:
        """Whether there is an answer."""
        return key in self._answers

    def __getitem__(self, key: str) -> T:
        """The answer of a hash."""
        return self._answers[key]

    def get(self, key: str) -> T | None:
        """The answer of a hash, if there is one."""
        return self._answers.get(key)

    def add(self, key: str, answer: T) -> None:
        """Append an answer; it is in the file when this returns.

        Raises OSError, naming the file, for a full disk.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"hash": key, **cast(dict[str, Any], answer)}, ensure_ascii=False) + "\n")
        self._answers[key] = answer


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _whole(lines: Sequence[bytes], kind: type[T]) -> Iterator[tuple[bytes, str, T]]:
    """The lines that are answers, each with its hash and what it holds."""
    for line in lines:
        found = _read(line, kind)
        if found is not None:
            yield line, *found


def _read(line: bytes, kind: type[T]) -> tuple[str, T] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    # A line without an end may be the beginning of a longer one.
    if not line.endswith(b"\n") or not isinstance(row, dict) or row.keys() != {"hash", *kind.__annotations__}:
        return None
    return row.pop("hash"), cast(T, row)


def read_examples(path: Path, suite: str) -> Iterator[dict[str, Any]]:
    """The rows of a suite's examples, as they are asked for: long prompts are large.

    Raises:
        UserError: a row of another suite, or none.
    """
    number = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            if row["suite"] != suite:
                raise UserError(f"{path}, line {number}: suite is {row['suite']!r}; {suite!r} is needed")
            yield row
    if not number:
        raise UserError(f"{path}: no examples; at least one is needed")
