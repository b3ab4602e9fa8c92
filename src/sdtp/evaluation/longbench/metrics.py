"""LongBench's metrics: how much of one reference a prediction has, from 0 to 100.

They are the official scorer's, its oddities included; two are left out. It gives 0 to texts that the ROUGE package runs
out of Python's recursion on (a thousand words without a full stop, as a long Chinese text can have), where these get
their score. And in `scoring` a blank prediction is 0 by every metric.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import jieba
import rouge

from sdtp.evaluation.longbench.references import paragraph_number
from sdtp.evaluation.longbench.tasks import Metric

# It reports the loading of its dictionary on stderr, at every start.
jieba.setLogLevel(logging.WARNING)

_ROUGE = rouge.Rouge(metrics=["rouge-l"], stats=["f"])
_ARTICLE = re.compile(r"\b(a|an|the)\b")
# First and last character of runs of Chinese and typographic punctuation. Those missing between them are missing in the
# official list: opening 《 and 〈〉 above all, and the full-width full stop.
_CHINESE_RUNS = (
    ("\u2013", "\u2014"),  # dashes
    ("\u2018", "\u2019"),
    ("\u201b", "\u201f"),  # quotation marks
    ("\u2026", "\u2027"),  # ellipsis, hyphenation point
    ("\u3001", "\u3003"),  # 、。〃
    ("\u300b", "\u3011"),  # 》 to 】
    ("\u3014", "\u301f"),  # brackets, wave dash, quotation marks
    ("\u3030", "\u3030"),
    ("\u303e", "\u303f"),
    ("\ufe4f", "\ufe4f"),
    ("\uff01", "\uff0d"),  # full-width ASCII
    ("\uff0f", "\uff0f"),
    ("\uff1a", "\uff20"),
    ("\uff3b", "\uff40"),
    ("\uff5b", "\uff64"),
)


def _delete(characters: Iterable[str]) -> dict[int, None]:
    """A table for `str.translate` that takes out the characters."""
    return {ord(character): None for character in characters}


_PUNCTUATION = _delete(string.punctuation)
_CHINESE_PUNCTUATION = _PUNCTUATION | _delete(
    chr(code) for first, last in _CHINESE_RUNS for code in range(ord(first), ord(last) + 1)
)


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the words they share, each as often as both have it; case, ASCII punctuation and articles do not matter."""
    return _f1(_english_words(prediction), _english_words(reference))


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the words they share, as jieba finds them; case, white space and punctuation do not matter."""
    return _f1(_chinese_words(prediction), _chinese_words(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of ROUGE-L as the package `rouge` has it, which the official scorer uses.

    The text is cut into sentences at full stops and into words at white space: case counts, and punctuation is part of
    the word before it. For each sentence of the reference the longest subsequence it shares with each sentence of the
    prediction is found; their union, each word counted once, is held against the number of different words of either
    text. The package `rouge-score` (Google's) lowers the case, drops punctuation, counts repeated words each time, and
    takes the text as one sequence: its scores are different ones.
    """
    with _recursion(len(prediction.split()) + len(reference.split())):
        try:
            scores = _ROUGE.get_scores([prediction], [reference])
        except ValueError:  # nothing but full stops in either
            return 0.0
    return 100 * float(scores[0]["rouge-l"]["f"])


def rouge_l_zh(prediction: str, reference: str) -> float:
    """`rouge_l` of the words that jieba finds, punctuation among them; only an ASCII full stop ends a sentence."""
    return rouge_l(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """100 over the number of classes that the prediction names, if the reference is one of them.

    A class whose name is part of the reference's, and so is named with it, does not count; but the one after such a
    class, in the order of `classes`, is counted unseen, as the official scorer goes through the list that it shortens.
    """
    named = []
    unseen = False
    for name in (name for name in classes if name in prediction):
        dropped = not unseen and name in reference and name != reference
        if not dropped:
            named.append(name)
        unseen = dropped
    return 100 / len(named) if reference in named else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """Share of the prediction's numbers that are the reference's, which reads "Paragraph 7".

    Raises:
        ValueError: the reference does not.
    """
    return _share(prediction, paragraph_number(reference, Metric.RETRIEVAL))


def retrieval_zh(prediction: str, reference: str) -> float:
    """`retrieval` for a reference that reads "段落7"."""
    return _share(prediction, paragraph_number(reference, Metric.RETRIEVAL_ZH))


def count(prediction: str, reference: str) -> float:
    """Share of the prediction's numbers that are the reference."""
    return _share(prediction, reference)


def code_similarity(prediction: str, reference: str) -> float:
    """Likeness, in whole percent, of the reference to the prediction's first line of code.

    That is the first line without a backtick, `#` or `//`; leading newlines aside, an empty line is one too.

    The official scorer takes fuzzywuzzy's `ratio`, which is that of the standard library's `difflib`, rounded, unless
    python-Levenshtein is installed, which the benchmark does not ask for. With it the ratio would be another one, which
    `rapidfuzz` has as well: 2 · (longest common subsequence) / (both lengths), never below difflib's.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(round(100 * difflib.SequenceMatcher(None, line, reference).ratio()))


# Those that need nothing but the two texts: all but `classification`.
BY_NAME: dict[Metric, Callable[[str, str], float]] = {
    Metric.QA_F1: qa_f1,
    Metric.QA_F1_ZH: qa_f1_zh,
    Metric.ROUGE_L: rouge_l,
    Metric.ROUGE_L_ZH: rouge_l_zh,
    Metric.RETRIEVAL: retrieval,
    Metric.RETRIEVAL_ZH: retrieval_zh,
    Metric.COUNT: count,
    Metric.CODE_SIMILARITY: code_similarity,
}


def _english_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    # Punctuation is a word of its own or part of one: taken out before, it would no longer part the words around it.
    words = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in jieba.cut(text))
    return [word for word in words if word]


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    shared = (Counter(prediction) & Counter(reference)).total()
    # The harmonic mean of shared / predicted and shared / referred, which has no value where nothing is shared.
    return 100 * 2 * shared / (len(prediction) + len(reference)) if shared else 0.0


def _share(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return 100 * numbers.count(number) / len(numbers) if numbers else 0.0


@contextmanager
def _recursion(deeper: int) -> Iterator[None]:
    """Let Python recurse that much deeper than it may: `rouge` does so once for each word of two sentences."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + deeper)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
