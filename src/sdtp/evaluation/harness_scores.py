"""Multiple-choice tasks of lm-evaluation-harness under `PrunedLM`: its own results, and a row an example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetNotFoundError
from lm_eval import __version__ as lm_eval_version
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from sdtp.errors import UserError
from sdtp.evaluation.harness import PrunedLM

# What a row is scored by: whether the choice with the highest log-likelihood is the right one.
METRIC = "acc"


def evaluate(
    lm: PrunedLM, tasks: Sequence[str], folders: Sequence[Path], fewshot: int, limit: int | None
) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` gives of the tasks, with the samples.

    Args:
        lm: a new one: its counts go into the results.
        tasks: names, of lm-eval's own or of `folders`.
        folders: of tasks' YAML files, which go before lm-eval's own.
        fewshot: examples before each question.
        limit: most questions of a task, the first ones; None for all.

    Raises:
        UserError: a task that there is none of, whose data cannot be had, or that is no multiple choice with accuracy.
    """
    manager = _manager(tasks, folders)
    try:
        loaded = list(manager.load(list(tasks))["tasks"].values())
    except (ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"harness.tasks: the data of {', '.join(tasks)} are on a hub and could not be had ({error}); the project's "
            "own tasks, sdtp_..., need none"
        ) from error
    for task in loaded:
        if METRIC not in task.aggregation() or task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"harness.tasks: {task.task_name} is no multiple-choice task with metric {METRIC}")
    found: dict[str, Any] = simple_evaluate(
        lm,
        tasks=loaded,
        num_fewshot=fewshot,
        limit=limit,
        batch_size=lm.batch_size,
        task_manager=manager,
        bootstrap_iters=0,
    )
    return found


def _manager(tasks: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """One that knows the tasks: without lm-eval's own, which take seconds to read, where `folders` have all of them."""
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths or None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        beside = f", nor in {', '.join(paths)}" if paths else ""
        raise UserError(f"harness.tasks: {', '.join(unknown)} is no task of lm-eval {lm_eval_version}{beside}")
    return manager


def rows(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], sizes: Mapping[tuple[str, str], tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """One row an example: what it scored and what was pruned of its context.

    Args:
        samples: of each task, as in lm-eval's results.
        sizes: `PrunedLM.sizes`.

    Yields:
        `task`; `id`; `score`, 100 where the answer was right and else 0; `prompt_tokens` and `kept_tokens` of the
        context, the first choice's where each has its own; `choices`, their number; and `log_likelihoods` of each.
    """
    for task, examples in samples.items():
        for example in examples:
            tokens, kept = sizes[tuple(example["arguments"][0])]
            yield {
                "task": task,
                "id": f"{task}-{example['doc_id']:05d}",
                "score": 100.0 * example[METRIC],
                "prompt_tokens": tokens,
                "kept_tokens": kept,
                "choices": len(example["arguments"]),
                "log_likelihoods": [answer[0] for answer in example["filtered_resps"]],
            }
