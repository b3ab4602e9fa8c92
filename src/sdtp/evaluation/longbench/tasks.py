"""The 21 tasks: category, language, longest answer, metric, the rules that go with a category; and what a prompt is."""

from __future__ import annotations

import dataclasses
import enum


class Category(enum.StrEnum):
    """What a task is of; a category's score is the mean over its tasks."""

    SINGLE_DOCUMENT = "single-document QA"
    MULTI_DOCUMENT = "multi-document QA"
    SUMMARISATION = "summarisation"
    FEW_SHOT = "few-shot learning"
    SYNTHETIC = "synthetic"
    CODE = "code completion"


class Language(enum.StrEnum):
    """What a task's texts are written in."""

    ENGLISH = "en"
    CHINESE = "zh"
    CODE = "code"


class Metric(enum.StrEnum):
    """How a prediction is held against a reference; `metrics` has the functions."""

    QA_F1 = "qa_f1"
    QA_F1_ZH = "qa_f1_zh"
    ROUGE_L = "rouge_l"
    ROUGE_L_ZH = "rouge_l_zh"
    CLASSIFICATION = "classification"
    RETRIEVAL = "retrieval"
    RETRIEVAL_ZH = "retrieval_zh"
    COUNT = "count"
    CODE_SIMILARITY = "code_similarity"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: the benchmark's own, which is also that of its file.
        category: what its score goes into.
        language: of its texts.
        max_new_tokens: most tokens of an answer.
        metric: how answers are scored.
    """

    name: str
    category: Category
    language: Language
    max_new_tokens: int
    metric: Metric

    @property
    def chat(self) -> bool:
        """Whether a chat model is asked through its template: few-shot examples and code are texts to be continued."""
        return self.category not in (Category.FEW_SHOT, Category.CODE)

    @property
    def first_line_only(self) -> bool:
        """Whether an answer ends with its first line: after it, models write the next example themselves."""
        return self.category == Category.FEW_SHOT

    @property
    def stops_at_newline(self) -> bool:
        """Whether a newline ends generation, as it does for the one task where models never stop at an answer."""
        return self.name == "samsum"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt as the model is given it.

    Attributes:
        id: of the example, unique in its task.
        task: its name.
        ids: token ids, at least one.
        context: where in `ids` the example's context begins and ends; around it are instruction, question and template.
        tokens_cut: tokens that were cut out of its middle.
        chat: whether it is in the model's chat template.
    """

    id: str
    task: str
    ids: list[int]
    context: tuple[int, int]
    tokens_cut: int
    chat: bool


_ENGLISH, _CHINESE, _CODE = Language.ENGLISH, Language.CHINESE, Language.CODE

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("narrativeqa", Category.SINGLE_DOCUMENT, _ENGLISH, 128, Metric.QA_F1),
        Task("qasper", Category.SINGLE_DOCUMENT, _ENGLISH, 128, Metric.QA_F1),
        Task("multifieldqa_en", Category.SINGLE_DOCUMENT, _ENGLISH, 64, Metric.QA_F1),
        Task("multifieldqa_zh", Category.SINGLE_DOCUMENT, _CHINESE, 64, Metric.QA_F1_ZH),
        Task("hotpotqa", Category.MULTI_DOCUMENT, _ENGLISH, 32, Metric.QA_F1),
        Task("2wikimqa", Category.MULTI_DOCUMENT, _ENGLISH, 32, Metric.QA_F1),
        Task("musique", Category.MULTI_DOCUMENT, _ENGLISH, 32, Metric.QA_F1),
        Task("dureader", Category.MULTI_DOCUMENT, _CHINESE, 128, Metric.ROUGE_L_ZH),
        Task("gov_report", Category.SUMMARISATION, _ENGLISH, 512, Metric.ROUGE_L),
        Task("qmsum", Category.SUMMARISATION, _ENGLISH, 512, Metric.ROUGE_L),
        Task("multi_news", Category.SUMMARISATION, _ENGLISH, 512, Metric.ROUGE_L),
        Task("vcsum", Category.SUMMARISATION, _CHINESE, 512, Metric.ROUGE_L_ZH),
        Task("trec", Category.FEW_SHOT, _ENGLISH, 64, Metric.CLASSIFICATION),
        Task("triviaqa", Category.FEW_SHOT, _ENGLISH, 32, Metric.QA_F1),
        Task("samsum", Category.FEW_SHOT, _ENGLISH, 128, Metric.ROUGE_L),
        Task("lsht", Category.FEW_SHOT, _CHINESE, 64, Metric.CLASSIFICATION),
        Task("passage_count", Category.SYNTHETIC, _ENGLISH, 32, Metric.COUNT),
        Task("passage_retrieval_en", Category.SYNTHETIC, _ENGLISH, 32, Metric.RETRIEVAL),
        Task("passage_retrieval_zh", Category.SYNTHETIC, _CHINESE, 32, Metric.RETRIEVAL_ZH),
        Task("lcc", Category.CODE, _CODE, 64, Metric.CODE_SIMILARITY),
        Task("repobench-p", Category.CODE, _CODE, 64, Metric.CODE_SIMILARITY),
    )
}


def task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"{name!r} is not a task of LongBench; accepted: {', '.join(TASKS)}")
    return TASKS[name]


def of_language(language: Language) -> list[str]:
    """Names of a language's tasks, and of the code tasks, which the official tables count for either language."""
    return [name for name, task in TASKS.items() if task.language in (language, Language.CODE)]
