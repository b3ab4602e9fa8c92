"""Shortens the prompts of a suite with LLMLingua-2, each to as many tokens as the trained pruner leaves of it.

Runs in an environment of its own, envs/llmlingua.lock, and imports nothing of this project: the package llmlingua needs
an older transformers than the project does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

# The package tells the two kinds of its weights apart by these in their name.
KINDS = ("xlm-roberta-large", "bert-base-multilingual-cased")


class Compressor(Protocol):
    """What is used of `llmlingua.PromptCompressor`."""

    def compress_prompt_llmlingua2(self, context: list[str], **settings: Any) -> dict[str, Any]: ...


def main() -> None:
    """Compress the examples that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="hub id, or a folder with the same name")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="language model, for its tokenizer")
    parser.add_argument("--examples", required=True, type=Path, metavar="JSONL", help="prompts of a suite")
    parser.add_argument("--like", required=True, type=Path, metavar="JSONL", help="predictions that say what was kept")
    parser.add_argument("--sinks", required=True, type=int, help="first tokens that stay")
    parser.add_argument("--local", required=True, type=float, help="share of the last tokens that stay")
    parser.add_argument("--min-local", required=True, type=int, help="last tokens that stay at least")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="the examples, shortened")
    args = parser.parse_args()
    check_weights(args.weights)
    examples, kept = read(args.examples), budgets(args.like)
    compressor, tokenizer = load(args.weights, args.model)
    from tqdm.auto import tqdm

    rows = []
    for example in tqdm(examples, desc="compressing", unit="example", mininterval=10):
        tokens = len(example["prompt_ids"])
        last = min(tokens, max(args.min_local, math.ceil(args.local * tokens)))
        rows.append(shortened(example, kept[example["id"]], args.sinks, last, compressor, tokenizer))
    write(args.output, rows)


def check_weights(weights: str) -> None:
    """Refuse weights that the package would not know what to do with.

    Raises:
        SystemExit: naming what it knows.
    """
    if not any(kind in weights for kind in KINDS):
        raise SystemExit(
            f"--weights {weights}: the package knows weights by their name, which needs {' or '.join(KINDS)}"
        )


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def budgets(path: Path) -> dict[str, int]:
    """Of each example the tokens that a method left of its prompt, by id."""
    return {row["id"]: row["kept_tokens"] for row in read(path)}


def load(weights: str, model: Path) -> tuple[Compressor, Counting]:
    """LLMLingua-2, on the first GPU there is, else on the CPU, and the language model's tokenizer.

    The package counts tokens with a vocabulary that it downloads; here they are counted as the language model does, of
    whose tokens there is a budget.
    """
    import torch
    from llmlingua import PromptCompressor, prompt_compressor  # type: ignore[import-not-found]  # other environment
    from tokenizers import Tokenizer

    # Not through transformers: the one here is older than the one that wrote the folder, and does not know its classes.
    tokenizer = Counting(Tokenizer.from_file(str(model / "tokenizer.json")))
    prompt_compressor.tiktoken = tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without this, code of the weights' repository would run.
    own = {"trust_remote_code": False}
    return PromptCompressor(weights, device_map=device, model_config=own, use_llmlingua2=True), tokenizer


class Counting:
    """The language model's tokenizer, in the place of the package's module `tiktoken`: the same whatever the model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encoding_for_model(self, name: str) -> Counting:
        """What encodes for a model."""
        return self

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with none put before or after them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def shortened(
    example: dict[str, Any], keep: int, sinks: int, last: int, compressor: Compressor, tokenizer: Counting
) -> dict[str, Any]:
    """An example whose prompt has about `keep` tokens: its first and last as they were, LLMLingua-2's text between.

    Args:
        example: with `prompt_ids`; all else stays as it is.
        keep: tokens to keep. Where the first and the last are as many or more, nothing is left between them.
        sinks, last: of the prompt's tokens, how many first and last ones stay; as much as pruning protects.
        compressor: LLMLingua-2; it takes whole words, so that it hits the number only about.
        tokenizer: the language model's.
    """
    ids: Sequence[int] = example["prompt_ids"]
    head, tail = list(ids[:sinks]), list(ids[max(sinks, len(ids) - last) :])
    middle = list(ids[sinks : len(ids) - len(tail)])
    budget = keep - len(head) - len(tail)
    if budget >= len(middle):
        return dict(example)
    between: list[int] = []
    if budget > 0:
        text = tokenizer.decode(middle)
        result = compressor.compress_prompt_llmlingua2([text], target_token=budget)
        between = tokenizer.encode(result["compressed_prompt"])
    return {**example, "prompt_ids": [*head, *between, *tail]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows), "utf-8"
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
