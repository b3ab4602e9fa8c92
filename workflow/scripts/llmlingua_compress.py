"""Shortens the prompts of a suite with LLMLingua-2, each to as many tokens as `sdtp budgets` allows it.

Runs in an environment of its own, envs/llmlingua.lock, and imports nothing of this project: the package llmlingua needs
an older transformers than the project does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

# The package tells the two kinds of its weights apart by these in their name.
KINDS = ("xlm-roberta-large", "bert-base-multilingual-cased")


class Compressor(Protocol):
    """What is used of `llmlingua.PromptCompressor`."""

    def compress_prompt_llmlingua2(self, context: list[str], **settings: Any) -> dict[str, Any]: ...


def main() -> None:
    """Compress the examples that the command line names."""
    args = arguments(str(__doc__)).parse_args()
    check_weights(args.weights)
    examples = read(args.examples)
    compressor, tokenizer = load(args.weights, args.model)
    from tqdm.auto import tqdm

    rows = []
    for example in tqdm(examples, desc="compressing", unit="example", mininterval=10):
        rows.append(shortened(example, compressor, tokenizer))
    if emptied := sum(map(left_empty, examples, rows)):
        logger.warning(
            "%d of %d prompts have nothing left of their context: what is around it uses up the budget",
            emptied,
            len(rows),
        )
    write(args.output, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line, as far as it is that of the timing too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--weights", required=True, help="hub id, or a folder with the same name")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="language model, for its tokenizer")
    parser.add_argument("--examples", required=True, type=Path, metavar="JSONL", help="made by `sdtp budgets`")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="what is written")
    return parser


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
    # Not by `splitlines`: characters of a text, U+2028 for one, would end its line.
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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


def shortened(example: dict[str, Any], compressor: Compressor, tokenizer: Counting) -> dict[str, Any]:
    """An example whose prompt has about as many tokens as its budget: the context shortened, all else as it was.

    Args:
        example: `prompt_ids`; `context`, where in them the text that may be shortened begins and ends; and `entries`,
            the tokens to keep of the whole prompt. Where what is around the context is as many or more, nothing is left
            of the context. All else of the example stays as it is.
        compressor: LLMLingua-2; it takes whole words, so that it hits the number only about.
        tokenizer: the language model's.

    Returns:
        The example without `entries`; `context` is where what is left of the text stands.
    """
    ids: Sequence[int] = example["prompt_ids"]
    start, end = example["context"]
    budget = example["entries"] - (len(ids) - (end - start))
    between = list(ids[start:end])
    if budget <= 0:
        between = []
    elif budget < len(between):
        text = tokenizer.decode(between)
        result = compressor.compress_prompt_llmlingua2([text], target_token=budget)
        # White space at its ends parts the text from what is around it; the package drops it.
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        between = tokenizer.encode(before + result["compressed_prompt"].strip() + after)
    own = {name: value for name, value in example.items() if name != "entries"}
    return {**own, "prompt_ids": [*ids[:start], *between, *ids[end:]], "context": [start, start + len(between)]}


def left_empty(example: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether an example had a context and what was made of it has none."""
    (start, end), (first, last) = example["context"], made["context"]
    return bool(start < end and first == last)


def write(path: Path, text: str) -> None:
    """Writes a text; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
