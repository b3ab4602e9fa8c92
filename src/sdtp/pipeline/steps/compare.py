"""Generates from one prompt with and without pruning, side by side, with the time each takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.evaluation.generation import Generated, generate_batch
from sdtp.pipeline.comparison import WARMUP, Times, first_difference, time_both
from sdtp.pipeline.formats import number
from sdtp.pipeline.given import Given, load, quiet_libraries
from sdtp.pipeline.models import ATTENTION
from sdtp.pipeline.terminal import columns, tell
from sdtp.pipeline.token_view import token_texts

# Before the first token in which the two texts differ.
MARK = "▶"
LABELS = {
    "prefill_s": ("prefill", 1.0, "s"),
    "decode_s": ("decode", 1.0, "s"),
    "seconds_per_output_token": ("one token", 1000.0, "ms"),
    "end_to_end_s": ("end to end", 1.0, "s"),
}
# Where the output is no terminal, whose width is known.
WIDTH = 120


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(
        prog="sdtp compare",
        description=f"{__doc__} Greedy; both times are of the same number of new tokens, stop tokens ignored.",
    )
    parser.add_argument("prompt", metavar="PROMPT.txt", help="UTF-8 text; - reads standard input")
    parser.add_argument("--model", required=True, metavar="M", help="folder of save_pretrained or `sdtp model`, hub id")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="pruner of save_pretrained or a run")
    parser.add_argument("--ratio", type=float, metavar="R", help="share of tokens each stage keeps; the pruner's own")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="64 unless given")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed rounds; 5 unless given")
    parser.add_argument("--raw", action="store_true", help="the text alone, not as a message in the chat template")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights; auto"
    )
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa", help="kernel; sdpa unless given")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    for option, value in (("--max-new-tokens", args.max_new_tokens), ("--repeats", args.repeats)):
        if value < 1:
            parser.error(f"{option} {value}: at least 1 is needed")
    quiet_libraries()
    given = load(args, args.max_new_tokens)
    found = _generate(args, given)
    if not args.json:  # the answer first: timing takes as long again for every round
        tell("\n".join(_answers(given, found)))
    times = time_both(given.model, given.pruner, given.ids, args.max_new_tokens, args.repeats)
    if args.json:
        tell(json.dumps(_plain(args, given, found, times), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        tell("\n".join(["", *_table(times), "", _note(args, given)]))


def _generate(args: argparse.Namespace, given: Given) -> Generated:
    # One prompt needs no padding, but `generate` asks for the token all the same.
    candidates = (given.tokenizer.pad_token_id, given.tokenizer.eos_token_id, 0)
    pad = next(token for token in candidates if token is not None)
    try:
        (generated,) = generate_batch(given.model, given.pruner, [given.ids], args.max_new_tokens, pad)
    except (TypeError, ValueError) as error:  # another model's pruner, or one that cannot prune this prompt
        raise UserError(f"--pruner {args.pruner}: {error}") from error
    return generated


def _answers(given: Given, found: Generated) -> list[str]:
    """Both texts beside each other, and what pruning left of the prompt."""
    difference = first_difference(found.unpruned_ids, found.pruned_ids)
    texts = [_marked(given.tokenizer, tokens, difference) for tokens in (found.unpruned_ids, found.pruned_ids)]
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    stages = zip(given.pruner.schedule.layers, found.kept, strict=True)
    left = ", ".join(f"{len(kept)} from layer {layer}" for layer, kept in stages)
    lines = columns("unpruned", "pruned", width)
    lines += [*columns("─" * len("unpruned"), "─" * len("pruned"), width), *columns(texts[0], texts[1], width), ""]
    if difference is None:
        lines.append(f"no difference in {len(found.pruned_ids)} new tokens")
    else:
        lines.append(f"{MARK} the first difference: new token {difference + 1}")
    return [*lines, *textwrap.wrap(f"of {len(given.ids)} prompt tokens are left {left}", max(40, width))]


def _marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], difference: int | None) -> str:
    """The text of new tokens, with a mark before the first that differs."""
    texts = token_texts(tokenizer, ids)
    if difference is None:
        return "".join(texts)
    return "".join([*texts[:difference], MARK, *texts[difference:]])


def _table(times: dict[str, Times | None]) -> list[str]:
    """Medians, and the ratio's quartiles."""
    rows = [("", "unpruned", "pruned", "unpruned / pruned (quartiles)")]
    for part, (name, factor, unit) in LABELS.items():
        found = times[part]
        if found is not None:
            low, middle, high = map(number, found.ratio)
            one, other = (f"{number(factor * three[1])} {unit}" for three in (found.unpruned, found.pruned))
            rows.append((name, one, other, f"{middle}× ({low}–{high})"))
    return [f"{row[0]:<10}  {row[1]:>10}  {row[2]:>10}  {row[3]}".rstrip() for row in rows]


def _note(args: argparse.Namespace, given: Given) -> str:
    rounds = "1 round" if args.repeats == 1 else f"{args.repeats} rounds"
    dtype = str(given.model.dtype).removeprefix("torch.")
    return (
        f"Medians of {rounds} after {WARMUP} of warm-up, {args.max_new_tokens} new tokens each, {dtype}, "
        f"{args.attention}, {given.model.device.type}.\n"
        "One prompt's times are a sample: docs/benchmarking.md says how to measure."
    )


def _plain(args: argparse.Namespace, given: Given, found: Generated, times: dict[str, Times | None]) -> dict[str, Any]:
    """All of it in JSON values; each time is a lower quartile, a median and an upper quartile, in seconds."""
    arms = {
        name: {"text": given.tokenizer.decode(tokens), "tokens": tokens}
        for name, tokens in (("unpruned", found.unpruned_ids), ("pruned", found.pruned_ids))
    }
    return {
        "model": args.model,
        "pruner": str(args.pruner),
        "ratio": args.ratio,
        "dtype": str(given.model.dtype).removeprefix("torch."),
        "attention": args.attention,
        "device": given.model.device.type,
        "prompt_tokens": len(given.ids),
        "layers": list(given.pruner.schedule.layers),
        "tokens_left": [len(kept) for kept in found.kept],
        **arms,
        "first_difference": first_difference(found.unpruned_ids, found.pruned_ids),
        "new_tokens_timed": args.max_new_tokens,
        "repeats": args.repeats,
        "warmup": WARMUP,
        "times": {part: None if found is None else dataclasses.asdict(found) for part, found in times.items()},
    }
