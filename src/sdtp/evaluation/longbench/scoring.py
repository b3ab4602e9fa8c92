"""From predictions and references to scores, without a model: of examples, tasks, categories, and all together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sdtp.evaluation.longbench import metrics
from sdtp.evaluation.longbench.tasks import TASKS, Category, Metric, Task, task
from sdtp.evaluation.stats import mean_interval

# (task, example id) of a row.
Key = tuple[str, str]
# By task and by example: 0 to 100.
Scores = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an example's prediction is held against.

    Attributes:
        answers: the right ones, at least one.
        classes: all there are, for tasks that classify; none for others.
    """

    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """A task's score.

    Attributes:
        mean: over its examples, 0 to 100.
        low, high: the mean's 95% bootstrap interval; nan for one example.
        n: examples scored.
        n_total: examples there are references of; more than `n` where some have no prediction.
    """

    mean: float
    low: float
    high: float
    n: int
    n_total: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scores of some tasks, each from 0 to 100.

    Attributes:
        tasks: by task, in the benchmark's order.
        categories: by category, the mean over its tasks here, whatever their numbers of examples.
        task_mean: the mean over the tasks.
        category_mean: the mean over the categories: "Avg" of the official leaderboard, made for one language at a time.
    """

    tasks: dict[str, TaskScore]
    categories: dict[Category, float]
    task_mean: float
    category_mean: float


def score(task: Task, prediction: str, reference: Reference) -> float:
    """A prediction's score by the task's metric against the answer it comes nearest to, 0 to 100.

    Of few-shot tasks the first line counts, leading newlines aside. A blank prediction scores 0.

    Raises:
        ValueError: a reference that the metric cannot use.
    """
    if task.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if not prediction.strip():
        return 0.0
    if task.metric == Metric.CLASSIFICATION:
        return max(metrics.classification(prediction, answer, reference.classes) for answer in reference.answers)
    metric = metrics.BY_NAME[task.metric]
    return max(metric(prediction, answer) for answer in reference.answers)


def score_rows(rows: Iterable[Mapping[str, Any]], references: Mapping[Key, Reference]) -> Scores:
    """Score rows that have `task`, `id` and `prediction`, as `predict` gives them.

    Args:
        rows: at most one of an example.
        references: by task and example id; those without a row are not scored.

    Returns:
        Scores by task, in the benchmark's order, and by example, in the rows'.

    Raises:
        ValueError: an unknown task, an example without a reference or with two rows, a prediction that is not text.
    """
    found: Scores = {}
    for row in rows:
        name, identifier, prediction = row["task"], row["id"], row["prediction"]
        where = f"prediction of {name} {identifier!r}"
        of_task = found.setdefault(task(name).name, {})
        if (name, identifier) not in references:
            raise ValueError(f"{where}: there is no such example among the references")
        if identifier in of_task:
            raise ValueError(f"{where}: there are two; one of an example is needed")
        if not isinstance(prediction, str):
            raise ValueError(f"{where} is {prediction!r}: text is needed (it may be empty)")
        of_task[identifier] = score(task(name), prediction, references[name, identifier])
    return {name: found[name] for name in TASKS if name in found}


def summarise(scores: Scores, references: Collection[Key]) -> Summary:
    """Scores of tasks, categories and all together, from those of examples.

    Args:
        scores: of `score_rows`, or of some of its tasks: those of one language (`tasks.of_language`), say.
        references: (task, example id) of all examples, for `n_total`.

    Raises:
        ValueError: no scores, or none of a task.
    """
    if not scores or not all(scores.values()):
        raise ValueError(
            f"{sum(map(len, scores.values()))} scores of {len(scores)} tasks: each task needs at least one"
        )
    of_tasks = {}
    for name in (name for name in TASKS if name in scores):
        values = list(scores[name].values())
        total = sum(reference[0] == name for reference in references)
        of_tasks[name] = TaskScore(_mean(values), *mean_interval(values), len(values), total)
    by_category: dict[Category, list[float]] = {}
    for name, cell in of_tasks.items():
        by_category.setdefault(TASKS[name].category, []).append(cell.mean)
    categories = {category: _mean(by_category[category]) for category in Category if category in by_category}
    task_mean = _mean([cell.mean for cell in of_tasks.values()])
    return Summary(of_tasks, categories, task_mean, _mean(list(categories.values())))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
