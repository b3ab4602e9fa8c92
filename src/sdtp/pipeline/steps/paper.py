"""Puts the paper's tables and figures together: each as CSV and figure, and all on one page."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from sdtp.evaluation.peers.attaching import plain
from sdtp.evaluation.peers.budgets import fraction
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.h2o import H2O
from sdtp.pipeline.config import Settings
from sdtp.pipeline.files import read_jsonl, write_atomically
from sdtp.pipeline.models import load_config, read_manifest
from sdtp.pipeline.observations import telling
from sdtp.pipeline.paper import missing, page, published
from sdtp.pipeline.paper.ablation import VARIANTS, ablation
from sdtp.pipeline.paper.arithmetic import Schedules
from sdtp.pipeline.paper.figures import figure
from sdtp.pipeline.paper.names import PARTS
from sdtp.pipeline.paper.part import Part
from sdtp.pipeline.paper.quality import speeds_of, table_1, table_3, table_6, with_llmlingua
from sdtp.pipeline.paper.saliency import figure_1, figure_2
from sdtp.pipeline.paper.shortened import shortened_speeds
from sdtp.pipeline.paper.speed import table_2
from sdtp.pipeline.paper.sweep import swept
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.reading import read_json
from sdtp.pipeline.results import read_latency
from sdtp.pipeline.shards import Labels
from sdtp.pipeline.step import step
from sdtp.pipeline.steps.ablation import by_variant, read_training
from sdtp.pipeline.steps.figures import shown_example
from sdtp.pipeline.steps.tables import write_csv

# What is on the page beside the paper's own figures: title by file name.
FURTHER = {
    "tradeoff-suites": "Quality against measured prefill speedup, all methods",
    "tradeoff-suites-memory": "Quality against peak memory, all methods",
    "suite-ruler": "RULER-style tasks, task by task",
    "ruler-heatmap": "Facts found, by their depth and the prompt's length",
    "suite-longbench": "LongBench, task by task",
}


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp paper", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="the configuration; shown on the page")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--saliency", required=True, type=Path, metavar="JSON", help="index of the saliency shards")
    parser.add_argument("--latency", required=True, type=Path, metavar="CSV", help="latency table")
    parser.add_argument(
        "--unpruned", required=True, type=Path, metavar="JSONL", help="evaluation of the unpruned model"
    )
    parser.add_argument("--full", required=True, nargs="+", type=Path, metavar="JSONL", help="of the run's pruner")
    parser.add_argument(
        "--variants",
        required=True,
        nargs="+",
        type=Path,
        metavar="JSONL",
        help="of those without a loss, Table 4's first",
    )
    parser.add_argument(
        "--training",
        required=True,
        nargs="+",
        type=Path,
        metavar="JSON",
        help="metrics of the run's own training, then of those without a loss",
    )
    parser.add_argument("--ruler", required=True, type=Path, metavar="CSV", help="table of the RULER-style tasks")
    parser.add_argument("--longbench", type=Path, metavar="CSV", help="table of LongBench, where it was run")
    parser.add_argument("--harness", required=True, type=Path, metavar="CSV", help="table of the multiple-choice tasks")
    parser.add_argument("--stage-position", required=True, type=Path, metavar="CSV", help="table of single stages")
    parser.add_argument("--stage-count", required=True, type=Path, metavar="CSV", help="table of numbers of stages")
    parser.add_argument("--cache-compression", type=Path, metavar="CSV", help="table of it on top of others")
    parser.add_argument("--tradeoff", required=True, type=Path, metavar="CSV", help="quality and speed of all methods")
    parser.add_argument(
        "--suite-scores", required=True, nargs="+", type=Path, metavar="JSONL", help="of the unpruned model"
    )
    parser.add_argument(
        "--llmlingua", nargs="+", default=[], type=Path, metavar="JSONL", help="scores-RATIO.jsonl on shortened prompts"
    )
    parser.add_argument(
        "--llmlingua-examples",
        nargs="+",
        default=[],
        type=Path,
        metavar="JSONL",
        help="examples-RATIO.jsonl: these prompts",
    )
    parser.add_argument(
        "--llmlingua-speeds", nargs="+", default=[], type=Path, metavar="JSON", help="timings of it, one a keep ratio"
    )
    parser.add_argument(
        "--figures", required=True, nargs="+", type=Path, metavar="SVG", help="shown beyond the paper's"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of page, tables and figures")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    with step("paper", args, outputs=[args.output / "paper.html"]) as log:
        settings = Settings.from_json(args.settings)
        known = published.load()
        again = missing.Again.from_json(settings.run, os.environ.get("SDTP_CONFIGURED", ""))
        parts = read_parts(args, settings, known, again)
        reduction = read_json(args.saliency)["reduction"]
        sweeps = {"figure-4": pd.read_csv(args.stage_position), "figure-5": pd.read_csv(args.stage_count)}
        for part in tqdm(parts, desc="parts", unit="part"):
            write_csv(part.rows, args.output / f"{part.name}.csv")
            save(figure(part, reduction, sweeps), args.output / part.name)
            log.artifact(args.output / f"{part.name}.csv", "paper")
            log.artifact(args.output / f"{part.name}.png", "paper")
        shown = page.Paper(
            run=settings.run,
            model=settings.model.source.ref,
            known=published.model_of(settings.model.source.ref),
            parts=parts,
            figures={path.stem: path.read_bytes() for path in [*args.figures, *own_figures(args.output)]},
            further={path.stem: FURTHER[path.stem] for path in args.figures},
            further_notes=[
                "Methods that one would use instead, measured in the same run: speeds side by side in one process, "
                "quality on the same examples."
            ],
            further_missing=[]
            if settings.peers.kvpress
            else missing.kvpress(again, read_json(args.model / "config.json")["model_type"]),
            published=known,
            settings=json.loads(args.settings),
        )
        for name, text in (("paper.html", page.render_html(shown)), ("paper.md", page.render_markdown(shown))):
            with write_atomically(args.output / name) as temporary:
                temporary.write_text(text, "utf-8")
            log.artifact(args.output / name, "paper")
        log.metric("rows", sum(len(part.measured) for part in parts))
        log.metric("rows_not_run", sum(len(part.rows) - len(part.measured) for part in parts))


def own_figures(output: Path) -> list[Path]:
    """The figures of the paper's parts, as they were just drawn."""
    return [output / f"{name}.svg" for name in PARTS]


def read_parts(args: argparse.Namespace, settings: Settings, known: pd.DataFrame, again: missing.Again) -> list[Part]:
    """The paper's tables and figures from the files of `args`, in the order of `PARTS`."""

    def of_paper(name: str) -> published.Numbers:
        return published.numbers(name, settings.model.source.ref, known)

    config = load_config(args.model)
    schedules = Schedules(settings, config)
    index, labels = read_json(args.saliency), Labels(args.saliency)
    scores = telling({example["id"]: labels[example["id"]].numpy() for example in index["examples"]}, args.saliency)
    shown, tokens = shown_example(args.data, args.model, list(scores))
    context = read_manifest(args.model)["context_length"]
    harness = pd.read_csv(args.harness)
    unpruned = read_jsonl(args.unpruned)
    full = [row for path in args.full for row in read_jsonl(path)]
    evaluated = by_variant(list(VARIANTS), args.variants, len(args.variants) // len(VARIANTS))
    trained, *trainings = map(read_training, args.training)
    scored = [row for path in args.suite_scores for row in read_jsonl(path)]
    parts = [
        figure_1(scores[shown], index["layers"], tokens, of_paper("figure-1")),
        figure_2(list(scores.values()), index["layers"], of_paper("figure-2")),
        table_1(
            read_suites(args, scored),
            scored,
            speeds_of(pd.read_csv(args.tradeoff)) | shortened_speeds(map(read_json, args.llmlingua_speeds)),
            schedules.layer_mean,
            [
                *([] if args.longbench else missing.longbench(again, settings.suites)),
                *([] if args.llmlingua else missing.llmlingua(again, settings.suites, longbench=bool(args.longbench))),
            ],
            of_paper("table-1"),
            own_prompts=settings.suites.longbench.templates is None,
            emptied=emptied(args.llmlingua_examples, scored),
        ),
        table_2(
            read_latency(args.latency),
            schedules.decode_tflop,
            context,
            settings.benchmark.new_tokens,
            lambda tokens, positions: missing.length(again, settings.benchmark.prompt_tokens, tokens, positions),
            of_paper("table-2"),
        ),
        table_3(harness, missing.harness(again, settings.harness.tasks), of_paper("table-3")),
        *(
            ablation(
                name,
                unpruned,
                full,
                [row for path in evaluated[name] for row in read_jsonl(path)],
                (trained, training),
                of_paper(name),
            )
            for name, training in zip(VARIANTS, trainings, strict=True)
        ),
        table_6(
            pd.read_csv(args.cache_compression) if args.cache_compression else None,
            []
            if args.cache_compression
            else missing.compression(again, settings.peers.methods, refusal(config, settings)),
            of_paper("table-6"),
        ),
        # Read as text: beside the unpruned model's empty cell a lone layer would be a fraction.
        swept("figure-4", pd.read_csv(args.stage_position, dtype={"layers": str}), of_paper("figure-4")),
        swept("figure-5", pd.read_csv(args.stage_count, dtype={"layers": str}), of_paper("figure-5")),
    ]
    return sorted(parts, key=lambda part: list(PARTS).index(part.name))


def refusal(config: PretrainedConfig, settings: Settings) -> str | None:
    """Why no rule can compress the cache of a model of this configuration, in a sentence; None where one can.

    Its layers are made without weights, as the rules' own check needs no more.
    """
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.model.trust_remote_code)
    try:
        # All rules read the same of a model.
        Compression(H2O(), fraction(settings.peers.cache_keep)).check(plain(made).architecture)
    except TypeError as error:
        return str(error)
    return None


def read_suites(args: argparse.Namespace, unpruned: Sequence[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """The tables of the suites that were run, LongBench first, with LLMLingua-2's rows where it was.

    Args:
        args: of the step.
        unpruned: scores of the unpruned model.
    """
    tables = {"longbench": args.longbench, "ruler": args.ruler}
    suites = {name: pd.read_csv(path) for name, path in tables.items() if path is not None}
    if not args.llmlingua:
        return suites
    own: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for path in args.llmlingua:
        for row in read_jsonl(path):
            own.setdefault(row["suite"], {}).setdefault(ratio_of(path), []).append(row)
    return {
        name: with_llmlingua(table, [row for row in unpruned if row["suite"] == name], own[name])
        if name in own
        else table
        for name, table in suites.items()
    }


def ratio_of(path: Path) -> float:
    """The keep ratio that a file's name ends with."""
    return float(path.stem.rpartition("-")[2])


def emptied(paths: Sequence[Path], unpruned: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The prompts of whose context LLMLingua-2 left nothing, since what is around it uses up the budget.

    Args:
        paths: of the shortened prompts, a file a suite and keep ratio.
        unpruned: scores of the unpruned model, which say how long the whole prompts are.

    Returns:
        `suite`, `category`, `task` and `keep_ratio` of each.
    """
    whole = {(row["suite"], row["task"], row["id"]): row["prompt_tokens"] for row in unpruned}
    found = []
    for path in paths:
        for row in read_jsonl(path):
            start, end = row["context"]
            # A prompt that is as long as it was had none.
            if start == end and len(row["prompt_ids"]) < whole[row["suite"], row["task"], row["id"]]:
                own = {name: row[name] for name in ("suite", "category", "task")}
                found.append({**own, "keep_ratio": ratio_of(path)})
    return found
