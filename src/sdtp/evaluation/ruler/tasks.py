"""The tasks, and what an example of one is."""

from __future__ import annotations

import dataclasses

# What each task is of (the paper's section 3).
CATEGORIES = {
    "single": "retrieval",
    "multi_key": "retrieval",
    "multi_value": "retrieval",
    "multi_query": "retrieval",
    "variables": "multi-hop tracing",
    "common_words": "aggregation",
    "frequent_words": "aggregation",
    "qa": "question answering",
}
# Tasks in which one reference is enough.
PART_MATCH = frozenset({"qa"})


@dataclasses.dataclass(frozen=True)
class RulerExample:
    """One prompt and what it asks for.

    Attributes:
        id: unique among all tasks and lengths.
        task: name of the task.
        length: prompt tokens that were asked for; `prompt_ids` has as many, seldom a few less.
        depth: where the single fact stands, 0 before the text and 1 after it; None for tasks that draw it.
        prompt_ids: what the model is given.
        context: where in `prompt_ids` the text begins and ends; around it are instruction, question and template.
        prompt: the message before template and reply.
        references: what has to be in the prediction.
        max_new_tokens: most tokens of a prediction.
        chat: whether the model's chat template is around the message.
        source: documents that the text is from.
    """

    id: str
    task: str
    length: int
    depth: float | None
    prompt_ids: list[int]
    context: tuple[int, int]
    prompt: str
    references: list[str]
    max_new_tokens: int
    chat: bool
    source: str
