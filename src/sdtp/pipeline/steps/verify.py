"""Checks on a model of one's own that pruning is exact in every way of generating, or refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sdtp.errors import UserError
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.given import load_model, load_pruner
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import ATTENTION
from sdtp.pruning.adapter import architecture
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Random
from sdtp.verification.families import FAMILIES, tiny_model
from sdtp.verification.verify import MODES, ROUNDING, Result, Verification

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens that the longest of the modes puts after the prompt.
AFTER_THE_PROMPT = 32
WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was found out about one model.

    Attributes:
        name: the model's, or the family's.
        setting: what was verified, in lines for people.
        numbers: of the `Verification`.
        results: of the reference and of every mode.
    """

    name: str
    setting: list[str]
    numbers: dict[str, Any]
    results: list[Result]


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments. Exits with 1 where a mode is wrong."""
    parser = argparse.ArgumentParser(
        prog="sdtp verify",
        description=f"{__doc__} The reference is a forward of the unpruned model in which removed tokens are hidden as "
        "keys; logits are compared at every step. Exits with 1 where one differs by more than rounding.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="M", help="hub id, or folder of save_pretrained or of `sdtp model`")
    which.add_argument("--families", action="store_true", help="tiny random models of every verified family instead")
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="trained pruner; without: random scores")
    parser.add_argument("--prompt-tokens", type=int, default=96, metavar="N", help="random tokens; 96 unless given")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; float32, and float64 with --families, unless given"
    )
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa", help="kernel; sdpa unless given")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args(argv)
    if args.prompt_tokens < 1:
        parser.error(f"--prompt-tokens {args.prompt_tokens}: at least 1 is needed")
    if args.families and args.pruner is not None:
        parser.error("--pruner belongs to one model: not with --families")
    transformers_logging.set_verbosity_error()
    pruner = None if args.pruner is None else load_pruner(args.pruner)
    verified = []
    with tqdm(total=(len(FAMILIES) if args.families else 1) * len(MODES), desc="verifying", unit="mode") as progress:
        for name, model in _models(args):
            verified.append(_verify(name, model, pruner or _default_pruner(name, model), args.prompt_tokens, progress))
    sys.stdout.write("\n".join(_matrix(verified) if args.families else _table(verified[0])) + "\n")
    if args.json is not None:
        with write_atomically(args.json) as temporary:
            temporary.write_text(json.dumps([_plain(one) for one in verified], indent=2) + "\n", "utf-8")
    if any(result.verdict == "wrong" for one in verified for result in one.results):
        raise SystemExit(1)


def _models(args: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel]]:
    """Name and model, one at a time."""
    if args.families:
        for family in FAMILIES:
            model = tiny_model(family, DTYPES[args.dtype or "float64"], args.attention)
            yield family, model.to(choose_device())  # type: ignore[arg-type]  # a method of transformers' own
    else:
        dtype = DTYPES[args.dtype or "float32"]
        yield args.model, load_model(args.model, dtype, args.attention, args.trust_remote_code)


def _default_pruner(name: str, model: PreTrainedModel) -> TokenPruner:
    """Random scores at about eight stages, which together remove four tokens in five."""
    layers = len(architecture(model).layers)
    step = max(1, round(layers / 8))
    try:
        return TokenPruner(PruningSchedule.geometric(layers, step, step, ratio=0.8, min_local=8), Random())
    except ValueError as error:
        raise UserError(f"--model {name} has {layers} layer: pruning needs one layer before the first stage") from error


def _verify(name: str, model: PreTrainedModel, pruner: TokenPruner, tokens: int, progress: Any) -> Verified:
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    check_context({"--prompt-tokens": tokens, "what follows the prompt": AFTER_THE_PROMPT}, context)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, (1, tokens), generator=generator)
    try:
        verification = Verification(model, pruner, prompt.to(model.device))
    except (TypeError, ValueError) as error:  # the pruner is another model's, or has nothing to remove
        raise UserError(f"{name}: {error}") from error
    results = [verification.reference()]
    for mode in MODES:
        progress.set_description(f"verifying {mode}")
        results.append(verification.run(mode))
        progress.update()
    numbers = {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
        "prompt_tokens": tokens,
        "survivors": verification.survivors,
        "largest_logit": verification.largest_logit,
        "tolerance": verification.tolerance,
        "effect": verification.effect,
    }
    return Verified(name, _setting(model, pruner, verification, numbers), numbers, results)


def _setting(
    model: PreTrainedModel, pruner: TokenPruner, verification: Verification, numbers: dict[str, Any]
) -> list[str]:
    """What was verified, in lines for people."""
    parts = architecture(model)
    stages = zip(pruner.schedule.layers, verification.survivors, strict=True)
    survivors = ", ".join(f"{count} from layer {layer}" for layer, count in stages)
    kind = type(model).__name__
    lines = [
        f"{kind}, {len(parts.layers)} layers, {numbers['dtype']}, {numbers['attention']}, {model.device.type}",
        f"{type(pruner.scorer).__name__} scores; of {numbers['prompt_tokens']} prompt tokens are left {survivors}",
        f"exact is |Δ logit| up to {verification.tolerance:.1e}, {ROUNDING[model.dtype]:.1e} of the largest logit; "
        f"pruning itself moves the logits at the prompt's last token by up to {verification.effect:.1e}",
    ]
    if not verification.effect > verification.tolerance:
        lines.append("that is no more than rounding: exact proves little, try another --prompt-tokens or --dtype")
    window = min((size for size in parts.windows if size is not None), default=0)
    if window > numbers["prompt_tokens"]:
        lines.append(f"prompts lie within the sliding window of {window}: give more --prompt-tokens to leave it")
    return lines


def _difference(result: Result) -> str:
    return "" if result.difference is None else f"{result.difference:.1e}"


def _counts(results: list[Result]) -> str:
    verdicts = [result.verdict for result in results]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("exact", "refused", "not run", "wrong"))


def _table(verified: Verified) -> list[str]:
    """The report of one model: a line for each mode, with the largest |Δ logit| or the reason."""
    width = max(len(result.mode) for result in verified.results) + 2
    lines = [verified.name]
    for setting in verified.setting:
        lines += textwrap.wrap(setting, WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines += ["", f"{'mode':<{width}}{'result':<9}max |Δ logit|, or why"]
    for result in verified.results:
        shown = "WRONG" if result.verdict == "wrong" else result.verdict
        start = f"{result.mode:<{width}}{shown:<9}"
        told = textwrap.wrap(result.reason or _difference(result), WIDTH - len(start)) or [""]
        lines += [start + told[0], *(" " * len(start) + line for line in told[1:])]
    return [*lines, "", _counts(verified.results)]


def _matrix(verified: list[Verified], block: int = 6) -> list[str]:
    """The report of the families: a row for each mode, a column for each family, some columns at a time."""
    lines = ["Tiny random models: max |Δ logit| of each mode", ""]
    for start in range(0, len(verified), block):
        lines += [*_block(verified[start : start + block]), ""]
    lines += _reasons(verified)
    return [*lines, "", _counts([result for one in verified for result in one.results])]


def _block(verified: list[Verified]) -> list[str]:
    rows = [["", *(one.name for one in verified)]]
    for results in zip(*(one.results for one in verified), strict=True):
        rows.append([results[0].mode, *map(_cell, results)])
    for label, number in (("exact is up to", "tolerance"), ("pruning itself moves by", "effect")):
        rows.append([f"({label})", *(f"{one.numbers[number]:.1e}" for one in verified)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _cell(result: Result) -> str:
    if result.verdict == "wrong":
        return "WRONG"
    return _difference(result) if result.verdict == "exact" else result.verdict


def _reasons(verified: list[Verified]) -> list[str]:
    """Why modes are not exact, once for all models of which it holds."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for one in verified:
        for result in one.results:
            if result.verdict != "exact":
                reason = result.reason.replace(one.numbers["class"], "model")
                where.setdefault((result.verdict, result.mode, reason), []).append(one.name)
    lines = []
    for verdict in ("wrong", "not run", "refused"):
        for (_, mode, reason), names in ((key, names) for key, names in where.items() if key[0] == verdict):
            which = "" if len(names) == len(verified) else f" ({', '.join(names)})"
            lines += textwrap.wrap(f"{verdict}: {mode}{which}: {reason}", WIDTH, subsequent_indent="  ")
    return lines


def _plain(verified: Verified) -> dict[str, Any]:
    """A model's numbers and results in JSON values, null for a number that is not finite."""
    results = [_finite(dataclasses.asdict(result)) for result in verified.results]
    return {"model": verified.name, **_finite(verified.numbers), "results": results}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}
