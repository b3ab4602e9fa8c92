"""Prompt templates: what stands before, between and after an example's context and its input.

`TEMPLATES` ask what LongBench's official templates ask, with the same fields in the same order and instructions in the
same places (questions and instructions come after the context, and before it as well where the official ones have them
there), in a wording of our own: theirs is not ours to ship. A model's scores move with the wording, so that scores made
with these compare methods within a run. `parse` takes a template as the official `dataset2prompt.json` writes it; with
that file's in their place, prompts are the official ones.
"""

from __future__ import annotations

import dataclasses
import string

from sdtp.evaluation.longbench.tasks import TASKS

FIELDS = ("context", "input")


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with gaps.

    Attributes:
        pieces: (text, field) pairs in their order, the field after the text; None where the template ends.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def asks(self) -> bool:
        """Whether the template has the input, a question mostly; some tasks have none."""
        return any(field == "input" for _, field in self.pieces)

    def render(self, context: str, question: str) -> tuple[str, str]:
        """The prompt, and the part of it that comes after the context; braces in the texts mean nothing."""
        values = {"context": context, "input": question, None: ""}
        filled = [text + values[field] for text, field in self.pieces]
        after = next(index for index, (_, field) in enumerate(self.pieces) if field == "context") + 1
        return "".join(filled), "".join(filled[after:])


def parse(text: str) -> Template:
    """Read a template in Python's format syntax with the fields `{context}`, once, and at most once `{input}`.

    Raises:
        ValueError: other fields, or others than that many of them; a conversion or a format; a lone brace.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}; {{context}} and {{input}} are its fields") from None
    fields = [field for _, field, _, _ in parsed if field is not None]
    extras = any(form or conversion for _, _, form, conversion in parsed)
    if extras or sorted(fields) not in (["context"], ["context", "input"]):
        raise ValueError(
            f"template {text!r} has the fields {fields}: plain {{context}} once and {{input}} at most once are accepted"
        )
    return Template(tuple((literal, field) for literal, field, _, _ in parsed))


_SEVERAL_DOCUMENTS = (
    "Find the answer to a question in the passages below. Reply with the answer alone.\n\nPassages:\n{context}\n\n"
    "Those were the passages. Reply with the answer to this question and with nothing else.\n\n"
    "Question: {input}\nAnswer:"
)
_QASPER_RULES = (
    "Be brief: one phrase or one sentence. Reply yes or no where that is what the question wants to know, and "
    "unanswerable where the paper does not tell. Leave out reasons."
)

_TEXTS = {
    "narrativeqa": (
        "Here is a story, from a book or a film script; a question about it comes after it. Reply briefly, with a few "
        "words where they are enough, and leave out reasons.\n\nStory: {context}\n\nThat was the story. Reply to the "
        "question about it briefly, with a few words where they are enough, and leave out reasons.\n\n"
        "Question: {input}\n\nAnswer:"
    ),
    "qasper": (
        "Here is a scientific paper; a question about it comes after it. " + _QASPER_RULES + "\n\nPaper: {context}\n\n"
        "That was the paper. Reply to the question about it. " + _QASPER_RULES + "\n\nQuestion: {input}\n\nAnswer:"
    ),
    "multifieldqa_en": (
        "A text follows, and a question that wants a short answer.\n\n{context}\n\nThat was the text. Reply with the "
        "answer to this question about it and with nothing else.\n\nQuestion: {input}\nAnswer:"
    ),
    "multifieldqa_zh": (
        "请先读下面这段材料，再用中文作简短回答。\n\n{context}\n\n材料到此结束。请根据材料回答问题，只写答案本身。\n\n"
        "问题：{input}\n回答："
    ),
    "hotpotqa": _SEVERAL_DOCUMENTS,
    "2wikimqa": _SEVERAL_DOCUMENTS,
    "musique": _SEVERAL_DOCUMENTS,
    "dureader": (
        "下面有几篇文章，请根据它们回答后面的问题。\n\n文章：{context}\n\n文章到此结束，请根据文章作答。\n\n"
        "问题：{input}\n回答："
    ),
    "gov_report": (
        "Summarize the government report below on one page.\n\nReport:\n{context}\n\n"
        "That was the report. Write its summary of one page.\n\nSummary:"
    ),
    "qmsum": (
        "Here is the transcript of a meeting; a request or question about it comes after it. Reply in a sentence or "
        "a few.\n\nTranscript:\n{context}\n\nThat was the meeting. Reply to the following in a sentence or a few.\n\n"
        "Query: {input}\nAnswer:"
    ),
    "multi_news": (
        "Summarize the news articles below together on one page.\n\nNews:\n{context}\n\n"
        "Those were the articles. Write one summary of them all, of one page.\n\nSummary:"
    ),
    "vcsum": "请阅读这份会议记录，然后用一段话概括会议内容。\n会议记录：\n{context}\n\n会议总结：",
    "trec": "Say of what type the last question is, as these examples do for theirs.\n\n{context}\n{input}",
    "triviaqa": (
        "Answer the last question from the passage before it, with the answer alone, as these examples do.\n\n"
        "{context}\n\n{input}"
    ),
    "samsum": "Sum up the last dialogue in a sentence or a few, as these examples do.\n\n{context}\n\n{input}",
    "lsht": "请仿照下面的例子，判断最后一条新闻属于哪一类。\n\n{context}\n{input}",
    "passage_count": (
        "Below are paragraphs from Wikipedia, some of them more than once. Find out how many there are when each is "
        "counted only the first time it appears.\n\n{context}\n\nHow many different paragraphs are there? Reply with "
        "the number alone: 1, 2, 3 or whatever it is.\n\nThe number is: "
    ),
    "passage_retrieval_en": (
        "Below are 30 paragraphs from Wikipedia, and after them a summary of one of them. Find out which.\n\n"
        "{context}\n\nThis is the summary.\n\n{input}\n\nOf which paragraph is it? Reply with its number in this form: "
        '"Paragraph 1", "Paragraph 2" and so on.\n\nIt is: '
    ),
    "passage_retrieval_zh": (
        "下面先列出若干段落，再给出其中某一段的摘要，请找出它属于哪一段。\n\n{context}\n\n摘要如下\n\n{input}\n\n"
        '这是哪一段的摘要？请按"段落1"、"段落2"这样的格式写出编号。\n\n编号是：'
    ),
    "lcc": "Continue this program by one line.\n{context}The line that follows:\n",
    "repobench-p": "Continue this program by one line.\n{context}{input}The line that follows:\n",
}

TEMPLATES: dict[str, Template] = {name: parse(_TEXTS[name]) for name in TASKS}
