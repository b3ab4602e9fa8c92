"""Tunes where the run's pruner prunes, on held-out examples, to the FLOPs that equal shares of a keep ratio take."""

import argparse
import logging
import statistics
from pathlib import Path

from sdtp.evaluation.costs import flop_costs
from sdtp.evaluation.schedule_search import search
from sdtp.pipeline.config import Settings
from sdtp.pipeline.damage_file import DamageFile, what_decides
from sdtp.pipeline.data_folder import split_hash
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.models import load_config, load_model
from sdtp.pipeline.pruners import read_pruner_at
from sdtp.pipeline.step import step
from sdtp.pipeline.tuning import MOST_EXAMPLES, choose_examples, described, told, write

logger = logging.getLogger(__name__)

SPLIT = "heldout"


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp tune", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="model and pruning settings")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder, of which heldout is used")
    parser.add_argument("--pruner", required=True, type=Path, metavar="DIR", help="trained pruner")
    parser.add_argument("--keep-ratio", required=True, type=float, help="whose FLOPs are the most that may be taken")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="JSONL",
        help="measurements, as they are made; those of other keep ratios lie beside it and are taken over too",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the tuned pruner")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    settings, ratio = Settings.from_json(args.settings), args.keep_ratio
    with step("tune", args, outputs=[args.output], wildcards={"keep_ratio": ratio}) as log:
        log.dataset(SPLIT, args.data / SPLIT, split_hash(args.data, SPLIT))
        layers = load_config(args.model).num_hidden_layers
        pruner = read_pruner_at(args.pruner, settings.pruning, layers, ratio)
        examples = choose_examples(args.data, SPLIT, MOST_EXAMPLES, pruner.schedule)
        rows = [*examples.choosing, *examples.reporting]
        tokens = statistics.median_low([len(row["prompt_ids"]) for row in rows])
        model = load_model(args.model, settings.model.dtype, settings.model.attention, choose_device())
        costs = flop_costs(model.config, tokens, pruner.schedule, pruner.scorer)
        share = costs.ratio(pruner.schedule.surviving(tokens))
        # What a stage does alone is the same for every ratio.
        others = [path for path in sorted(args.checkpoint.parent.glob("*.jsonl")) if path != args.checkpoint]
        made_from = what_decides(model, args.model, args.pruner, settings.model.attention)
        known = DamageFile(args.checkpoint, made_from, others)
        found = search(model, pruner, costs, share, pruner.schedule, examples.choosing, examples.reporting, known)
        given = {
            "target": "flops",
            "ratio": share,
            "keep_ratio": ratio,
            "prompt_tokens": tokens,
            "model": str(args.model),
            "pruner": str(args.pruner),
            "attention": settings.model.attention,
            "data": str(args.data),
            "split": SPLIT,
            "content_sha256": split_hash(args.data, SPLIT),
        }
        result = described(found, examples, model, pruner, given)
        write(args.output, found, model, pruner, result)
        logger.info("%s", "\n".join(told(result)))
        for name, row in result["report"].items():
            log.metrics({f"{name}/kl": row["kl"], f"{name}/loss": row["loss"]})
        log.metric("tuned_is_chosen", found.chosen == "tuned")
        log.metric("measurements_taken_over", known.taken)
        log.artifact(args.output)
