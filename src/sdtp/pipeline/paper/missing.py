"""Rows of what was not run: why, and what runs it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Self

import yaml

from sdtp.evaluation.longbench.tasks import Category
from sdtp.evaluation.names import PAPER_TASKS
from sdtp.pipeline.paper.part import not_run
from sdtp.pipeline.target_settings import SuitesSettings

LLMLINGUA = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
LONGBENCH = {
    "kind": "hub",
    "ref": "zai-org/LongBench",
    "revision": "5e628be450b7e67fb7ae6e201bd6d8f7056f7672",
    "sha256": None,
}
# The paper's methods in Table 1, beside LLMLingua-2: the unpruned model, and these at each keep ratio.
PRUNERS = ("sdtp", "sdtp-half")
PRESSES = ("SnapKVPress", "ExpectedAttentionPress")
# Types of the models that kvpress 0.5.5 takes, as their config.json has it.
KVPRESS_MODELS = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3")
# Stands for a model that whoever runs the command has to choose.
MODEL = {"kind": "hub", "ref": "MODEL", "revision": None, "sha256": None}


@dataclasses.dataclass(frozen=True)
class Again:
    """How a run was configured, and so how it is made once more with other values of some keys.

    Attributes:
        run: its name.
        files: the configuration files that Snakemake was given, in their order.
        overrides: what its `--config` set on top of them.
    """

    run: str
    files: Sequence[str] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, run: str, text: str) -> Self:
        """Of a run's name and an object of `files` and `overrides`; an empty text is neither."""
        return cls(run, **json.loads(text or "{}"))

    def command(self, name: str, changes: Mapping[str, Any]) -> str:
        """A line for a shell that runs the workflow with other values.

        They go through a file: what `--config` takes below a block arrives as text, numbers and nulls too.

        Args:
            name: of the file, without suffix.
            changes: nested, as in a configuration; a list or a source as a whole.
        """
        path = f"results/{self.run}/{name}.yaml"
        text = yaml.safe_dump(
            _laid_over(self.overrides, changes), default_flow_style=True, sort_keys=False, width=float("inf")
        )
        files = " ".join(map(shlex.quote, [*self.files, path]))
        return (
            f"echo {shlex.quote(text.strip())} > {shlex.quote(path)} && "
            f".venv/bin/snakemake paper --cores all --configfile {files}"
        )


def _laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def longbench(again: Again, suites: SuitesSettings) -> list[dict[str, Any]]:
    """LongBench without its data: a row each category of the paper, and their average, and each of its methods.

    Args:
        again: how the run was configured.
        suites: its `suites`; what they lack of the paper's methods, the command adds.
    """
    why = (
        "LongBench's data are a download; suites.longbench.source names a folder of the official JSON lines, or its "
        "hub id, and is null here"
    )
    command = again.command("longbench", {"suites": _with_longbench(suites)})
    arms = [("unpruned", 1.0), *((method, ratio) for method in PRUNERS for ratio in suites.keep_ratios)]
    return [
        not_run(why, command, suite="longbench", category=category, method=method, keep_ratio=ratio)
        for category in ("average", *(category.value for category in Category))
        for method, ratio in arms
    ]


def _with_longbench(suites: SuitesSettings) -> dict[str, Any]:
    changes: dict[str, Any] = {"longbench": {"source": LONGBENCH}}
    if lacking := [method for method in PRUNERS if method not in suites.methods]:
        changes["methods"] = [*suites.methods, *lacking]
    return changes


def llmlingua(again: Again, suites: SuitesSettings, longbench: bool) -> list[dict[str, Any]]:
    """LLMLingua-2 without its weights, a row each suite.

    Args:
        again: how the run was configured.
        suites: its `suites`.
        longbench: whether LongBench's data are there; if not, the command of its row asks for them too.
    """
    why = (
        f"LLMLingua-2's weights are a download ({LLMLINGUA}); paper.llmlingua names them or a folder, and is null here"
    )
    weights: dict[str, Any] = {"paper": {"llmlingua": LLMLINGUA}}
    data = {} if longbench else {"suites": _with_longbench(suites)}
    commands = {
        "longbench": again.command("longbench-llmlingua", weights | data),
        "ruler": again.command("llmlingua", weights),
    }
    return [
        not_run(why, f"make llmlingua && {command}", suite=suite, category="average", method="llmlingua2")
        for suite, command in commands.items()
    ]


def kvpress(again: Again, model_type: str) -> list[dict[str, Any]]:
    """NVIDIA's kvpress where no press is named.

    Args:
        again: how the run was configured.
        model_type: that of the model's config.json.
    """
    why = "it has an environment of its own, and peers.kvpress names none of its presses here"
    changes: dict[str, Any] = {"peers": {"kvpress": list(PRESSES)}}
    if model_type not in KVPRESS_MODELS:
        why = (
            f"it takes no model of type {model_type}; the command is for another in place of MODEL, as a run of its own"
        )
        changes |= {"run": f"{again.run}-kvpress", "model": {"source": MODEL}}
    return [not_run(why, f"make kvpress && {again.command('kvpress', changes)}", method="NVIDIA's kvpress")]


def compression(again: Again, methods: Sequence[str], refusal: str | None) -> list[dict[str, Any]]:
    """Cache compression where no method of the configuration has a rule on top.

    Args:
        again: how the run was configured.
        methods: its `peers.methods`.
        refusal: why no rule can be put on top of anything with this model; None where one can.
    """
    changes: dict[str, Any] = {"peers": {"methods": [*methods, "sdtp+h2o"]}}
    if refusal is None:
        why = "peers.methods has no rule on top of sdtp; with sdtp+h2o there, it has"
        return [not_run(why, again.command("compression", changes), method="sdtp+h2o")]
    why = f"{refusal}; the command is for another model in place of MODEL, as a run of its own"
    changes |= {"run": f"{again.run}-compression", "model": {"source": MODEL}}
    return [not_run(why, again.command("compression", changes), method="sdtp+h2o")]


def harness(again: Again, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Those of the paper's tasks that were not run; one command runs them all.

    Args:
        again: how the run was configured.
        tasks: its `harness.tasks`.
    """
    left = [task for task in PAPER_TASKS if task not in tasks]
    command = again.command("harness", {"harness": {"tasks": [*tasks, *left]}})
    why = "its questions are a download, and harness.tasks does not name it here"
    return [not_run(why, command, task=task, method="sdtp") for task in left]


def length(again: Again, timed: Sequence[int], tokens: int, positions: int | None) -> str:
    """What times a prompt of `tokens` tokens as well.

    Args:
        again: how the run was configured.
        timed: its `benchmark.prompt_tokens`.
        tokens: of the prompt.
        positions: that a model needs which has to take this one's place; None where the run's own has room.
    """
    changes: dict[str, Any] = {"benchmark": {"prompt_tokens": sorted({*timed, tokens})}}
    if positions is not None:
        changes |= {"run": f"{again.run}-{tokens}", "model": {"source": MODEL}}
    return again.command(f"length-{tokens}", changes)
