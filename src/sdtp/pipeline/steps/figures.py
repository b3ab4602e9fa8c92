"""Draws the figures of a run, as SVG and PNG, and writes what those of the saliency show as tables."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sdtp.errors import UserError
from sdtp.pipeline import observations, plots
from sdtp.pipeline.data_folder import TRAINING, load_split
from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.files import read_jsonl
from sdtp.pipeline.models import load_tokenizer
from sdtp.pipeline.plotstyle import figure_files, save
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.results import read_history, read_latency, read_quality
from sdtp.pipeline.shards import Labels
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.tables import write_csv


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp figures", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="logged; figures depend on no setting")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, for its tokenizer")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--test-data", required=True, type=Path, metavar="DIR", help="test examples")
    parser.add_argument("--saliency", required=True, type=Path, metavar="JSON", help="index of the saliency shards")
    parser.add_argument("--history", required=True, type=Path, metavar="CSV", help="learning curves")
    parser.add_argument("--generations", required=True, nargs="+", type=Path, metavar="JSONL", help="one a keep ratio")
    parser.add_argument("--latency", required=True, type=Path, metavar="CSV", help="latency table")
    parser.add_argument("--quality", required=True, type=Path, metavar="CSV", help="quality table")
    parser.add_argument("--sparsity", required=True, type=Path, metavar="CSV", help="table of that figure to write")
    parser.add_argument("--foresight", required=True, type=Path, metavar="CSV", help="table of that figure to write")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the figures")
    args = parser.parse_args(argv)
    # Other steps write to the folder at the same time: which files in it are this one's, their names say.
    drawn = [file for name in FIGURES for file in figure_files(args.output / name)]
    with step("figures", args, outputs=[args.output, *drawn, args.sparsity, args.foresight]) as log:
        index, labels = read_json(args.saliency), Labels(args.saliency)
        scores = {example["id"]: labels[example["id"]].numpy() for example in index["examples"]}
        telling = observations.telling(scores, args.saliency)
        examples, layers = list(telling.values()), index["layers"]
        sparsity = observations.sparsity_table(examples, layers)
        foresight = observations.foresight_table(examples, layers)
        for table, path in ((sparsity, args.sparsity), (foresight, args.foresight)):
            write_csv(table, path)
            log.artifact(path)
        latency, quality = read_latency(args.latency), read_quality(args.quality)
        lengths = [len(ids) for ids in load_split(args.test_data, "test")["prompt_ids"]]
        shown, tokens = shown_example(args.data, args.model, list(telling))
        figures = {
            "saliency": plots.saliency(telling[shown], layers, tokens, index["reduction"]),
            "sparsity": plots.sparsity(sparsity, kept_shares(args.generations)),
            "foresight": plots.foresight(foresight, layers),
            "latency": plots.latency(latency),
            "speedup": plots.speedup(latency),
            "quality": plots.quality(quality, latency, float(np.median(lengths))),
            "training": plots.training(read_history(args.history)),
        }
        for name in tqdm(FIGURES, desc="figures", unit="figure"):
            save(figures[name], args.output / name)
            log.artifact(args.output / f"{name}.png", "figures")


def shown_example(data: Path, model: Path, identifiers: list[str]) -> tuple[str, list[str]]:
    """Id and token texts of the example the heat map shows: the first retrieval of the index, else its first example.

    A retrieval prompt holds the fact that the answer needs, so that its saliency can be judged by eye.
    """
    rows = {row["id"]: row for split in TRAINING for row in load_split(data, split).to_list()}
    missing = [identifier for identifier in identifiers if identifier not in rows]
    if missing:
        raise UserError(
            f"{data}: no example {missing[0]}, which has saliency; accepted: ids of {' and '.join(TRAINING)}"
        )
    shown = next((identifier for identifier in identifiers if rows[identifier]["task"] == "retrieval"), identifiers[0])
    tokenizer = load_tokenizer(model)
    return shown, [str(tokenizer.decode([token])) for token in rows[shown]["prompt_ids"]]


def kept_shares(generations: list[Path]) -> dict[float, np.ndarray]:
    """Keep ratio, largest first, -> [stages]: mean share of the prompt's tokens left after each stage."""
    rows: dict[float, list[dict[str, Any]]] = {}
    for path in generations:
        for row in read_jsonl(path):
            rows.setdefault(row["keep_ratio"], []).append(row)
    return {
        ratio: np.mean([[len(stage) / row["prompt_tokens"] for stage in row["kept"]] for row in rows[ratio]], axis=0)
        for ratio in sorted(rows, reverse=True)
    }
