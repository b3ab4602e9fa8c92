"""Rows of what was not run: why, and what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdtp.evaluation.names import PAPER_TASKS
from sdtp.pipeline.paper.part import not_run

LLMLINGUA = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"


def again(run: str) -> str:
    """What runs the workflow on a run's configuration once more."""
    return f"snakemake paper --cores all --configfile FILE  # that of run {run}"


def longbench(run: str) -> list[dict[str, Any]]:
    """LongBench without its data."""
    why = (
        "LongBench's data are a download; suites.longbench.source names a folder of the official JSON lines, or its "
        "hub id, and is null here"
    )
    return [not_run(why, again(run), suite="longbench", category="average", method="sdtp")]


def llmlingua(run: str) -> list[dict[str, Any]]:
    """LLMLingua-2 without its weights."""
    why = (
        f"LLMLingua-2's weights are a download ({LLMLINGUA}); paper.llmlingua names them or a folder, and is null here"
    )
    return [not_run(why, again(run), suite="ruler", category="average", method="llmlingua2")]


def compression(run: str) -> list[dict[str, Any]]:
    """Cache compression where no method of the configuration has a rule on top."""
    return [
        not_run("peers.methods has no rule on top of sdtp; with sdtp+h2o there, it has", again(run), method="sdtp+h2o")
    ]


def harness(run: str, ran: Sequence[str]) -> list[dict[str, Any]]:
    """Those of the paper's tasks that were not run."""
    why = "its questions are a download"
    return [
        not_run(
            why,
            f"sdtp-lm-eval --model sdtp --tasks {task} --num_fewshot 5 "
            f"--model_args pretrained=results/{run}/model,pruner=results/{run}/pruner",
            task=task,
            method="sdtp",
        )
        for task in PAPER_TASKS
        if task not in ran
    ]
