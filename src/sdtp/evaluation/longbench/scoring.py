"""From a prediction and its reference to a score, without a model."""

from __future__ import annotations

from sdtp.evaluation.longbench import metrics
from sdtp.evaluation.longbench.references import Reference
from sdtp.evaluation.longbench.tasks import Metric, Task


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
