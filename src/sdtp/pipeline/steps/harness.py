"""Answers multiple-choice tasks of lm-evaluation-harness under one method at one keep ratio; nothing is asked twice."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.evaluation import names
from sdtp.evaluation.harness import PrunedLM
from sdtp.evaluation.harness_answers import Scored
from sdtp.evaluation.harness_scores import evaluate, rows
from sdtp.evaluation.methods import Fixed
from sdtp.pipeline.chosen import check_method, chosen_method, seeds_of
from sdtp.pipeline.config import Settings
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import digest, write_atomically, write_jsonl
from sdtp.pipeline.models import load_model, load_tokenizer
from sdtp.pipeline.multiple_choice import LOCAL_TASKS
from sdtp.pipeline.predictions import Predictions, what_decides
from sdtp.pipeline.step import step
from sdtp.pruning.pruner import TokenPruner


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp harness", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model, pruning, harness, the method's own")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--tasks", nargs="*", default=[], type=Path, metavar="DIR", help="folders of tasks' YAML files")
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="trained pruner, for what uses it")
    parser.add_argument("--method", required=True, choices=names.METHODS, help="what prunes")
    parser.add_argument("--keep-ratio", required=True, type=float, help="fraction of tokens each stage keeps")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="JSONL", help="answers, as they are made")
    parser.add_argument("--code", required=True, metavar="HASH", help="of the code; no other code's answers count")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example and seed")
    parser.add_argument("--results", required=True, type=Path, metavar="JSON", help="lm-eval's own results, one a seed")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    check_method(args.method, args.keep_ratio, args.pruner)
    settings = Settings.from_json(args.settings)
    wildcards = {"method": args.method, "keep_ratio": args.keep_ratio}
    with step("harness", args, outputs=[args.output, args.results], wildcards=wildcards) as log:
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        tokenizer = load_tokenizer(args.model)
        given = json.loads(args.settings)
        made_from = what_decides(given, args.model, args.pruner, args.method, args.keep_ratio, args.code)
        done = Predictions(args.checkpoint, Scored)
        answers = taken_over = truncated = 0
        scored: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for seed in seeds_of(args.method, settings):
            chosen = chosen_method(args.method, settings, model, args.keep_ratio, args.pruner, seed)
            pruner = chosen.pruner if isinstance(chosen, Fixed) else chosen
            if not isinstance(pruner, TokenPruner | None):
                raise UserError(f"--method {args.method} is no pruner of contexts: sdtp and its like are accepted")
            lm = PrunedLM(model, pruner, tokenizer=tokenizer, batch_size=settings.harness.batch_size)
            lm.known = Remembered(done, digest([made_from, seed]))
            found = evaluate(lm, settings.harness.tasks, args.tasks, settings.harness.fewshot, settings.harness.limit)
            samples = found.pop("samples")
            answers += lm.answers
            taken_over += lm.taken_over
            truncated += lm.truncated_requests
            results.append({"seed": seed, **found})
            identity = {"method": args.method, "keep_ratio": args.keep_ratio, "seed": seed}
            scored += [
                {"suite": "harness", "category": category(row["task"]), **row, **identity}
                for row in rows(samples, lm.sizes)
            ]
        write_jsonl(args.output, scored)
        with write_atomically(args.results) as temporary:
            temporary.write_text(json.dumps(results, indent=1, default=str) + "\n", "utf-8")
        for task in dict.fromkeys(row["task"] for row in scored):
            own = [row["score"] for row in scored if row["task"] == task]
            log.metric(f"{task}/accuracy", sum(own) / len(own))
        kept, tokens = (sum(row[name] for row in scored) for name in ("kept_tokens", "prompt_tokens"))
        log.metric("kept_share", kept / tokens)
        log.metric("truncated_requests", truncated)
        log.metric("answers", answers)
        log.metric("answers_taken_over", taken_over)
        for path in (args.output, args.results):
            log.artifact(path)


@dataclasses.dataclass(frozen=True)
class Remembered:
    """Answers in a file: the `known` of a `PrunedLM`.

    Attributes:
        done: the file.
        made_from: hash of all that decides an answer beside the request itself.
    """

    done: Predictions[Scored]
    made_from: str

    def find(self, context: Sequence[int], continuation: Sequence[int]) -> Scored | None:
        """The answer to a request; None where there is none yet."""
        return self.done.get(self._key(context, continuation))

    def add(self, context: Sequence[int], continuation: Sequence[int], scored: Scored) -> None:
        """Keep an answer."""
        self.done.add(self._key(context, continuation), scored)

    def _key(self, context: Sequence[int], continuation: Sequence[int]) -> str:
        return digest([self.made_from, context, continuation])


def category(task: str) -> str:
    """Whose task it is: of the project, over a local text, or of lm-eval or the user."""
    return "local" if task in LOCAL_TASKS else "lm-eval"
