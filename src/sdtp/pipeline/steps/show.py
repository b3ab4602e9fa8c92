"""Shows a prompt in the terminal, each token shaded by the stage at which a pruner removed it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.pipeline.given import load, quiet_libraries
from sdtp.pipeline.models import ATTENTION
from sdtp.pipeline.prompt_trace import PromptTrace, trace_prompt
from sdtp.pipeline.terminal import marked, shade, shaded, tell, use_colour
from sdtp.pipeline.token_view import removal_stages, token_texts


@dataclasses.dataclass(frozen=True)
class View:
    """A prompt token by token.

    Attributes:
        ids, texts: of each token.
        stages: for each token the 0-based stage that removed it; the number of stages for one that stayed.
        layers: decoder layer of each stage.
        trace: what was scored and kept.
    """

    ids: list[int]
    texts: list[str]
    stages: list[int]
    layers: tuple[int, ...]
    trace: PromptTrace


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(
        prog="sdtp show",
        description=f"{__doc__} Without colours, ⟨4|text⟩ is what was removed before decoder layer 4.",
    )
    parser.add_argument("prompt", metavar="PROMPT.txt", help="UTF-8 text; - reads standard input")
    parser.add_argument("--model", required=True, metavar="M", help="folder of save_pretrained or `sdtp model`, hub id")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="pruner of save_pretrained or a run")
    parser.add_argument("--ratio", type=float, metavar="R", help="share of tokens each stage keeps; the pruner's own")
    parser.add_argument("--raw", action="store_true", help="the text alone, not as a message in the chat template")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights; auto"
    )
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa", help="kernel; sdpa unless given")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    parser.add_argument("--no-color", action="store_true", help="marks instead of colours, as where no terminal is")
    parser.add_argument("--json", action="store_true", help="print JSON: every token with its stage and scores")
    args = parser.parse_args(argv)
    quiet_libraries()
    view = _view(args)
    if args.json:
        tell(json.dumps(_plain(args, view), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        colour = use_colour(sys.stdout) and not args.no_color
        tell("\n".join([_text(view, colour), "", *_legend(view, colour)]))


def _view(args: argparse.Namespace) -> View:
    given = load(args)
    try:
        trace = trace_prompt(given.model, given.pruner, given.ids)
    except (TypeError, ValueError) as error:  # another model's pruner, or one that cannot prune this prompt
        raise UserError(f"--pruner {args.pruner}: {error}") from error
    stages = removal_stages(trace.kept, len(given.ids))
    return View(given.ids, token_texts(given.tokenizer, given.ids), stages, given.pruner.schedule.layers, trace)


def _text(view: View, colour: bool) -> str:
    if colour:
        return shaded(view.texts, view.stages, len(view.layers))
    return marked(view.texts, view.stages, view.layers)


def _legend(view: View, colour: bool) -> list[str]:
    """What the shades or marks mean, with counts."""
    rows = [("", "tokens removed", "left", "")]
    for stage, (layer, kept) in enumerate(zip(view.layers, view.trace.kept, strict=True)):
        swatch = shade("  ", stage, len(view.layers)) if colour else f"⟨{layer}|…⟩"
        share = f"{100 * len(kept) / len(view.ids):.0f}%"
        rows.append((f"{swatch} before layer {layer}", str(view.stages.count(stage)), str(len(kept)), share))
    swatch = f"{shade('  ', len(view.layers), len(view.layers))} " if colour else ""
    lines = [f"{len(view.ids)} tokens, {swatch}{view.stages.count(len(view.layers))} of them in every layer"]
    if all(stage == len(view.layers) for stage in view.stages):
        return [*lines, "nothing was removed: the prompt is no longer than what the pruner's schedule protects"]
    # Colour codes take no room, and each swatch has the same.
    width = max(len(row[0]) for row in rows)
    hidden = len(shade("  ", 0, 2)) - 2 if colour else 0
    for index, (name, removed, left, share) in enumerate(rows):
        room = width - (hidden if index == 0 else 0)
        lines.append(f"{name:<{room}}  {removed:>14}  {left:>6}  {share:>4}".rstrip())
    return lines


def _plain(args: argparse.Namespace, view: View) -> dict[str, Any]:
    """The view in JSON values; a score is null for a stage that did not score the token."""
    stages = [
        {"stage": stage, "layer": layer, "removed": view.stages.count(stage), "left": len(kept)}
        for stage, (layer, kept) in enumerate(zip(view.layers, view.trace.kept, strict=True))
    ]
    tokens = [
        {
            "id": token,
            "text": text,
            "removed_at_stage": stage if stage < len(view.layers) else None,
            "removed_before_layer": view.layers[stage] if stage < len(view.layers) else None,
            "scores": [_finite(scores.get(position)) for scores in view.trace.scores],
        }
        for position, (token, text, stage) in enumerate(zip(view.ids, view.texts, view.stages, strict=True))
    ]
    return {
        "model": args.model,
        "pruner": str(args.pruner),
        "ratio": args.ratio,
        "prompt_tokens": len(view.ids),
        "stages": stages,
        "tokens": tokens,
    }


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
