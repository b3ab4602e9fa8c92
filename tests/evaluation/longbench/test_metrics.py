"""The metrics, by cases worked out by hand; the arithmetic stands beside each."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from sdtp.evaluation.longbench import metrics
from sdtp.evaluation.longbench.tasks import Metric

TWO_TEXTS: list[tuple[Callable[[str, str], float], str, str, float]] = [
    # F1 = 2 · shared / (predicted + referred), in words without case, ASCII punctuation and articles.
    (metrics.qa_f1, " Paris ", "Paris", 100.0),
    (
        metrics.qa_f1,
        "The Eiffel-Tower, in Paris!",
        "Eiffel Tower in Paris",
        100 * 4 / 7,
    ),  # eiffeltower in paris: 2 of 3+4
    (metrics.qa_f1, "no no no", "no", 50.0),  # one shared: 2/(3+1)
    (metrics.qa_f1, "no no no", "no no", 80.0),  # two shared: 4/(3+2)
    (metrics.qa_f1, "theatre", "atre", 0.0),  # "the" goes as a word only
    (metrics.qa_f1, "x\n\ty", "X y", 100.0),
    (metrics.qa_f1, "the a an", "an answer", 0.0),  # nothing predicted
    (metrics.qa_f1, "answer", "The", 0.0),  # nothing referred to
    (metrics.qa_f1, "“Paris”", "Paris", 0.0),  # typographic quotation marks are no ASCII punctuation
    # 我/来到/北京/清华大学: four words, as jieba finds them; of nine and four characters it would be 61.5
    (metrics.qa_f1_zh, "我来到北京清华大学", "清华大学", 40.0),  # 2/(4+1)
    (metrics.qa_f1_zh, "我来到北京，清华大学。", "我来到北京 清华大学", 100.0),
    (metrics.qa_f1_zh, "GDP增长", "gdp增长！", 100.0),
    (
        metrics.qa_f1_zh,
        "《史记》",
        "史记",
        100 * 2 / 3,
    ),  # 》 is punctuation of the official list, 《 is a word: 2/(2+1)
    (metrics.qa_f1_zh, "。，", "史记", 0.0),
    # 2 · union of subsequences / (different words of both)
    (metrics.rouge_l, "the cat sat", "the cat ran", 100 * 2 / 3),  # the cat: 4/(3+3)
    (metrics.rouge_l, "b a", "a b", 50.0),  # one of them: 2/(2+2)
    (metrics.rouge_l, "The cat", "the cat", 50.0),  # case counts: 2/(2+2)
    (metrics.rouge_l, "cat, dog", "cat dog", 50.0),  # and so does punctuation
    (metrics.rouge_l, "cat, dog", "cat dog.", 50.0),  # but for full stops
    (metrics.rouge_l, "the the the cat", "the cat", 100.0),  # 2 different words each; repeated ones would give 4/(4+2)
    (metrics.rouge_l, "c d. a b", "a b. c d", 100.0),  # sentence by sentence; as one sequence 2 of 4: 50
    (metrics.rouge_l, "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 200 * 4 / (8 + 5)),  # w1 w2 w3 w5; Lin 2004
    (metrics.rouge_l, "...", "cat", 0.0),
    (metrics.rouge_l, "cat", "...", 0.0),
    (metrics.rouge_l_zh, "我来到北京清华大学", "我来到清华大学", 100 * 6 / 7),  # 我/来到/清华大学: 6/(4+3)
    (metrics.rouge_l_zh, "我来到。", "我来到", 80.0),  # 。 is a word: 4/(3+2)
    (metrics.retrieval, "Paragraph 15", "Paragraph 15", 100.0),
    (metrics.retrieval, "15", "It is Paragraph 15, not 16", 100.0),  # the first number after the word
    (metrics.retrieval, "Paragraph 1 or 15", "Paragraph 15", 50.0),  # one of two numbers
    (metrics.retrieval, "15, 15 or 3", "Paragraph 15", 100 * 2 / 3),
    (metrics.retrieval, "Paragraph 150", "Paragraph 15", 0.0),
    (metrics.retrieval, "the first", "Paragraph 1", 0.0),
    (metrics.retrieval_zh, "段落3和段落4", "段落3", 50.0),
    (metrics.retrieval_zh, "3", "段落3", 100.0),
    (metrics.count, "There are 17 of them", "17", 100.0),
    (metrics.count, "17 of 20, so 17", "17", 100 * 2 / 3),
    (metrics.count, "017", "17", 0.0),
    (metrics.count, "seventeen", "17", 0.0),
    (metrics.code_similarity, "return x", "return x", 100.0),
    (metrics.code_similarity, "return y", "return x", 88.0),  # 2·7/16 = 87.5, rounded to the even number
    (metrics.code_similarity, "abcdeXYZ", "abcdeUVW", 62.0),  # 2·5/16 = 62.5, rounded to the even number
    (metrics.code_similarity, "\n\nreturn x\nreturn y", "return x", 100.0),
    (metrics.code_similarity, "# why\n// how\n```python\nreturn x", "return x", 100.0),
    (metrics.code_similarity, "y = 2  # two\nreturn x", "return x", 100.0),
    (metrics.code_similarity, "  \nreturn x", "return x", 20.0),  # a blank line is a line: 2·1/(2+8)
    (metrics.code_similarity, "# only\n# words", "return x", 0.0),
    # difflib goes by the longest run, abc, and what is left and right of it: 2·3/20; the longest common subsequence,
    # 12345, would give 2·5/20
    (metrics.code_similarity, "12345abc", "abc1x2y3z4w5", 30.0),
]


@pytest.mark.parametrize(("metric", "prediction", "reference", "expected"), TWO_TEXTS)
def test_hand_computed(metric: Callable[[str, str], float], prediction: str, reference: str, expected: float) -> None:
    # ROUGE's package adds 1e-8 to a denominator.
    assert metric(prediction, reference) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("prediction", "reference", "classes", "expected"),
    [
        ("Type: Date", "Date", ["City", "Date"], 100.0),
        ("Date or City", "Date", ["City", "Date"], 50.0),  # two named
        ("City", "Date", ["City", "Date"], 0.0),
        ("date", "Date", ["City", "Date"], 0.0),  # case counts
        ("Da", "Date", ["City", "Date"], 0.0),  # the class has to be in the prediction, not the prediction in the class
        ("Title of a person", "Title of a person", ["person", "Title of a person"], 100.0),  # "person" is named with it
        ("a person", "Title of a person", ["person", "Title of a person"], 0.0),
        ("Title of a person", "person", ["person", "Title of a person"], 50.0),  # no part of the reference
        ("ab", "ab", ["a", "b", "ab"], 50.0),  # b, after a, which is dropped, is counted unseen
        ("abc", "abc", ["a", "b", "c", "abc"], 50.0),  # a dropped, b unseen, c dropped, abc unseen: b and abc
        ("abc", "abc", ["abc", "a", "x", "b"], 50.0),  # x is not named: b comes after a
    ],
)
def test_classification_hand_computed(prediction: str, reference: str, classes: list[str], expected: float) -> None:
    assert metrics.classification(prediction, reference, classes) == expected


@pytest.mark.parametrize("metric", metrics.BY_NAME)
def test_empty_prediction_scores_0(metric: Metric) -> None:
    reference = {Metric.RETRIEVAL: "Paragraph 1", Metric.RETRIEVAL_ZH: "段落1"}.get(metric, "1")
    assert metrics.BY_NAME[metric]("", reference) == 0.0
    assert metrics.classification("", "1", ["1", "2"]) == 0.0


def test_a_long_text_without_a_full_stop_has_a_score_of_its_own() -> None:
    """550 words each, the first one shared: deeper than Python recurses by itself."""
    limit = sys.getrecursionlimit()
    prediction = " ".join(["same", *(f"p{number}" for number in range(549))])
    reference = " ".join(["same", *(f"r{number}" for number in range(549))])
    assert len(prediction.split()) + len(reference.split()) > limit
    assert metrics.rouge_l(prediction, reference) == pytest.approx(100 / 550, abs=1e-5)
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize(
    ("metric", "reference", "needed"),
    [(metrics.retrieval, "15", '"Paragraph "'), (metrics.retrieval_zh, "Paragraph 15", '"段落"')],
)
def test_a_reference_without_a_paragraph_is_refused(
    metric: Callable[[str, str], float], reference: str, needed: str
) -> None:
    with pytest.raises(ValueError, match=f"'{reference}' names no paragraph; {needed}"):
        metric("15", reference)
