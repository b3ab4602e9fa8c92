"""The table of tasks against the benchmark's own lists."""

from __future__ import annotations

from collections import Counter

import pytest

from sdtp.evaluation.longbench.tasks import TASKS, Category, Language, Metric, of_language, task

# Most new tokens, from the benchmark's settings.
LENGTHS = {
    32: {
        "hotpotqa",
        "2wikimqa",
        "musique",
        "triviaqa",
        "passage_count",
        "passage_retrieval_en",
        "passage_retrieval_zh",
    },
    64: {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"},
    128: {"narrativeqa", "qasper", "dureader", "samsum"},
    512: {"gov_report", "qmsum", "multi_news", "vcsum"},
}
METRICS = {
    Metric.QA_F1: {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"},
    Metric.QA_F1_ZH: {"multifieldqa_zh"},
    Metric.ROUGE_L: {"gov_report", "qmsum", "multi_news", "samsum"},
    Metric.ROUGE_L_ZH: {"dureader", "vcsum"},
    Metric.CLASSIFICATION: {"trec", "lsht"},
    Metric.RETRIEVAL: {"passage_retrieval_en"},
    Metric.RETRIEVAL_ZH: {"passage_retrieval_zh"},
    Metric.COUNT: {"passage_count"},
    Metric.CODE_SIMILARITY: {"lcc", "repobench-p"},
}


def test_answer_lengths_and_metrics_are_the_benchmarks() -> None:
    assert len(TASKS) == 21
    for length, names in LENGTHS.items():
        assert {name for name, task in TASKS.items() if task.max_new_tokens == length} == names
    for metric, names in METRICS.items():
        assert {name for name, task in TASKS.items() if task.metric == metric} == names


def test_categories_and_languages_have_the_benchmarks_numbers_of_tasks() -> None:
    counts = Counter((task.category, task.language) for task in TASKS.values())
    for category in (Category.SINGLE_DOCUMENT, Category.MULTI_DOCUMENT, Category.SUMMARISATION, Category.FEW_SHOT):
        assert (counts[category, Language.ENGLISH], counts[category, Language.CHINESE]) == (3, 1)
    assert (counts[Category.SYNTHETIC, Language.ENGLISH], counts[Category.SYNTHETIC, Language.CHINESE]) == (2, 1)
    assert counts[Category.CODE, Language.CODE] == 2
    assert {name for name, task in TASKS.items() if task.language == Language.CHINESE} == {
        "multifieldqa_zh",
        "dureader",
        "vcsum",
        "lsht",
        "passage_retrieval_zh",
    }


def test_exceptions_are_the_benchmarks() -> None:
    assert [name for name, task in TASKS.items() if not task.chat] == [
        *("trec", "triviaqa", "samsum", "lsht"),
        *("lcc", "repobench-p"),
    ]
    assert [name for name, task in TASKS.items() if task.first_line_only] == ["trec", "triviaqa", "samsum", "lsht"]
    assert [name for name, task in TASKS.items() if task.stops_at_newline] == ["samsum"]


def test_code_counts_for_either_language() -> None:
    assert len(of_language(Language.ENGLISH)) == 16
    assert of_language(Language.CHINESE) == [
        *("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"),
        *("lcc", "repobench-p"),
    ]


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"'passage_retrieval' is not a task of LongBench; accepted: narrativeqa, qasp"
    ):
        task("passage_retrieval")
