"""Predictions that are made once: each under a hash of all that decides it, in a file that is appended to.

The file lies outside a step's outputs, which are deleted before a rerun: an interrupted step goes on where it was, and
after a change of settings only what they decide is predicted again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from sdtp.errors import UserError
from sdtp.pipeline.files import canonical_json, sha256_file, sha256_files, write_atomically
from sdtp.pipeline.models import read_manifest

logger = logging.getLogger(__name__)


class Answer(TypedDict):
    """What a model made of a prompt; `kept_tokens` of the prompt are in the last layer's cache."""

    prediction: str
    kept_tokens: int


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


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


def keys(examples: Sequence[Mapping[str, Any]], made_from: Any, seed: int | None) -> list[str]:
    """Of each example the hash that its prediction stands under.

    Args:
        examples: with `task`, `prompt_ids` and `max_new_tokens`; nothing else of them counts.
        made_from: JSON value of all else that decides a prediction: model, pruner, method, settings, code.
        seed: of random choices, None for a method without.
    """
    common = digest([made_from, seed])
    return [digest([common, row["task"], row["max_new_tokens"], row["prompt_ids"]]) for row in examples]


class Predictions:
    """Answers by hash, in a JSON-lines file.

    Lines that are no answers, such as the beginning of one that a killed process wrote, are removed when it is opened.

    Args:
        path: of the file, made with the first answer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = []
        for line in lines:
            found = _read(line)
            if found is not None:
                self._answers[found[0]] = found[1]
                whole.append(line)
        if len(whole) < len(lines):
            logger.info("%s: removed %d lines that are no predictions", path, len(lines) - len(whole))
            with write_atomically(path) as temporary:
                temporary.write_bytes(b"".join(whole))

    def __contains__(self, key: str) -> bool:
        """Whether there is an answer."""
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        """The answer of a hash."""
        return self._answers[key]

    def add(self, key: str, answer: Answer) -> None:
        """Append an answer; it is in the file when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"hash": key, **answer}, ensure_ascii=False) + "\n")
        self._answers[key] = answer


def _read(line: bytes) -> tuple[str, Answer] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    # A line without an end may be the beginning of a longer one.
    if not line.endswith(b"\n") or not isinstance(row, dict) or row.keys() != {"hash", *Answer.__annotations__}:
        return None
    return row["hash"], Answer(prediction=row["prediction"], kept_tokens=row["kept_tokens"])


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
