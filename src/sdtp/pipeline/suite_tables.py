"""A suite's table: mean scores of tasks, categories and the whole, each method held against the unpruned model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation import strata
from sdtp.evaluation.longbench import tasks as longbench
from sdtp.evaluation.longbench.tasks import Language
from sdtp.evaluation.stats import right_or_wrong
from sdtp.pipeline.results import difference_columns, with_verdicts

# fmt: off
SUITE_COLUMNS = [
    "suite", "language", "category", "task", "length", "method", "keep_ratio", "value", "low", "high", "n",
    "difference", "difference_low", "difference_high", "p_value", "p_holm", "verdict", "prompt_tokens", "compression",
]
# fmt: on
NAMES = {"ruler": "RULER-style tasks", "longbench": "LongBench", "harness": "lm-evaluation-harness"}
# Stands for a category or task in a row that is over all of them.
ALL = "all"
# Category, in the table of the harness, of the tasks that the paper has.
PAPER = "paper"
UNPRUNED = ("unpruned", 1.0)
# Columns that tell apart the groups of examples that rows are about.
GROUP = ["suite", "language", "category", "task", "length"]

# A method at a keep ratio, and an example of a suite.
Cell = tuple[str, float]
Example = tuple[str, str]
# Of each cell the examples' rows, seeds averaged within the example.
Cells = dict[Cell, dict[Example, dict[str, Any]]]


def suite_cells(rows: Iterable[Mapping[str, Any]]) -> Cells:
    """The rows of `sdtp score`, of one suite, as one row per example and cell: of score and kept tokens seeds' means.

    Raises:
        UserError: more than one suite; an example twice with one seed; a method with other examples or seeds than due:
            those of the unpruned model, each with every seed that the method was run with.
    """
    collected: dict[Cell, dict[Example, dict[Any, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    suites = set()
    for row in rows:
        suites.add(row["suite"])
        cell, example = (row["method"], row["keep_ratio"]), (row["task"], row["id"])
        if row["seed"] in collected[cell][example]:
            raise UserError(f"{cell[0]} at keep ratio {cell[1]} has two scores of {example[0]} {example[1]!r}")
        collected[cell][example][row["seed"]] = row
    if len(suites) != 1:
        raise UserError(f"scores of the suites {sorted(suites)}: those of one are needed")
    due = collected.get(UNPRUNED, {}).keys()
    for (method, ratio), examples in collected.items():
        seeds = set().union(*examples.values())
        if examples.keys() != due or any(own.keys() != seeds for own in examples.values()):
            raise UserError(
                f"{method} at keep ratio {ratio} has scores of {len(examples)} examples and unpruned of {len(due)}, "
                f"{len(examples.keys() & due)} of them shared: all must be the same, with each seed"
            )
    return {cell: {example: _mean(list(collected[cell][example].values())) for example in due} for cell in collected}


def _mean(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in ("score", "kept_tokens")}
    return {**rows[0], **means}


def check_complete(cells: Cells, methods: Sequence[str], ratios: Sequence[float]) -> None:
    """Raise UserError unless there are scores of each method at each ratio, of unpruned at 1.0, and of no other."""
    wanted = {UNPRUNED} | {(method, ratio) for method in methods for ratio in ratios}
    if cells.keys() != wanted:
        raise UserError(f"--scores hold (method, keep ratio) {sorted(cells)}: {sorted(wanted)} are needed")


def suite_table(cells: Cells) -> pd.DataFrame:
    """One row per group of examples and cell, columns `SUITE_COLUMNS`.

    Groups are the whole, each category and each task; of RULER also each of these at each length. A category's value is
    the mean over its tasks' means; the whole's is that over the tasks of RULER and of the harness, and over the
    categories' means of LongBench. Of LongBench the whole and its categories stand once for each `language`, as in its
    official tables: English and Chinese, the code tasks in either; a task's row has its own.

    `low` and `high` are the value's 95% interval: Wilson's for shares of right answers (RULER, harness) where each task
    has as many examples, else by bootstrap within each task. `difference` is the value minus unpruned's on the same
    examples, with its paired interval and p-value; `p_holm` is that adjusted for all methods and keep ratios of the
    group, and `verdict` says what the interval shows. `prompt_tokens` is the mean over the examples, `compression` all
    of them over those that the last layer keeps. What does not exist is missing: a length of rows over all lengths,
    differences of unpruned, intervals of a single example.

    Args:
        cells: as `suite_cells` gives them.
    """
    order = sorted(cells, key=lambda cell: cell != UNPRUNED)  # stable
    table = []
    for group in _groups(cells[UNPRUNED]):
        baseline = _scores(cells[UNPRUNED], group)
        for cell in order:
            own = [cells[cell][example] for examples in group.tasks for example in examples]
            scores = _scores(cells[cell], group)
            pair = None if cell == UNPRUNED else strata.paired_difference(scores, baseline, group.weights, right=100.0)
            low, high = _interval(group, scores)
            table.append(
                {
                    "suite": group.suite,
                    "language": group.language,
                    "category": group.category,
                    "task": group.task,
                    "length": group.length,
                    "method": cell[0],
                    "keep_ratio": cell[1],
                    "value": strata.mean(scores, group.weights),
                    "low": low,
                    "high": high,
                    "n": len(own),
                    **difference_columns(pair),
                    "prompt_tokens": math.fsum(row["prompt_tokens"] for row in own) / len(own),
                    "compression": sum(row["prompt_tokens"] for row in own) / sum(row["kept_tokens"] for row in own),
                }
            )
    return with_verdicts(pd.DataFrame(table), GROUP)[SUITE_COLUMNS].astype({"length": "Int64"})


def wholes(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a suite's table that are over all of it: one a method and keep ratio, of LongBench and language."""
    return table[(table["category"] == ALL) & (table["task"] == ALL) & table["length"].isna()]


@dataclass(frozen=True)
class _Group:
    """Examples that a row of the table is about: those of each task, and what each task's mean weighs."""

    suite: str
    language: str | None
    category: str
    task: str
    length: int | None
    tasks: list[list[Example]]
    weights: list[float]


def _groups(rows: Mapping[Example, Mapping[str, Any]]) -> list[_Group]:
    """All lengths together, then each: the whole, then each category with its tasks, in the order of the examples.

    Of LongBench first all of that in English, then what there is in Chinese; a task of both, code, with the first.
    """
    lengths = sorted({row["length"] for row in rows.values() if "length" in row})
    suite = next(iter(rows.values()))["suite"]
    counted = _by_language({task for task, _ in rows}) if suite == "longbench" else {None: None}
    groups = []
    for length in (None, *lengths):
        listed: set[str] = set()
        for language, names in counted.items():
            # category -> task -> its examples
            parts: dict[str, dict[str, list[Example]]] = {}
            for example, row in rows.items():
                if length in (None, row.get("length")) and (names is None or row["task"] in names):
                    parts.setdefault(row["category"], {}).setdefault(row["task"], []).append(example)
            count = sum(map(len, parts.values()))
            shares = [
                1 / (len(parts) * len(tasks)) if suite == "longbench" else 1 / count
                for tasks in parts.values()
                for _ in tasks
            ]
            every = [examples for tasks in parts.values() for examples in tasks.values()]
            groups.append(_Group(suite, language, ALL, ALL, length, every, shares))
            for category, tasks in parts.items():
                equal = [1 / len(tasks)] * len(tasks)
                groups.append(_Group(suite, language, category, ALL, length, list(tasks.values()), equal))
                for task, own in tasks.items():
                    if task not in listed:
                        of_task = None if language is None else longbench.task(task).language.value
                        groups.append(_Group(suite, of_task, category, task, length, [own], [1.0]))
            listed |= {task for tasks in parts.values() for task in tasks}
    return groups


def _by_language(tasks: set[str]) -> dict[str | None, set[str] | None]:
    """Of LongBench's tasks those that count for each language there is; code alone counts for English."""
    languages = {longbench.task(name).language for name in tasks}
    chosen = [language for language in (Language.ENGLISH, Language.CHINESE) if language in languages]
    return {language.value: tasks & set(longbench.of_language(language)) for language in chosen or [Language.ENGLISH]}


def _scores(rows: Mapping[Example, Mapping[str, Any]], group: _Group) -> list[list[float]]:
    return [[float(rows[example]["score"]) for example in examples] for examples in group.tasks]


def _interval(group: _Group, scores: list[list[float]]) -> tuple[float, float]:
    # Most of LongBench's metrics give more than right and wrong.
    if group.suite == "longbench" and not right_or_wrong(chain.from_iterable(scores), (), 100.0):
        return strata.interval(scores, group.weights)
    return strata.proportion_interval(scores, group.weights, 100.0)
