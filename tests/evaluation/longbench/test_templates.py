"""Templates: which fields they have, in which order, and what makes one unusable."""

from __future__ import annotations

import pytest

from sdtp.evaluation.longbench.tasks import TASKS, Language
from sdtp.evaluation.longbench.templates import TEMPLATES, parse


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_context_and_its_question_after_it(name: str) -> None:
    prompt, after = TEMPLATES[name].render("CONTEXT", "INPUT")
    before = prompt[: prompt.index("CONTEXT")]
    assert prompt == before + "CONTEXT" + after
    assert before.strip()  # an instruction
    assert TEMPLATES[name].asks == ("INPUT" in after)
    # The last line stands open for the answer; the few-shot tasks' inputs do so themselves.
    assert (after.endswith("INPUT")) == TASKS[name].first_line_only
    assert TASKS[name].language != Language.CHINESE or any("\u4e00" <= character <= "\u9fff" for character in before)


def test_tasks_without_a_question_are_the_benchmarks() -> None:
    assert [name for name in TASKS if not TEMPLATES[name].asks] == [
        *("gov_report", "multi_news", "vcsum"),
        *("passage_count", "lcc"),
    ]


def test_code_goes_on_without_a_break() -> None:
    assert "CONTEXTINPUT" in TEMPLATES["repobench-p"].render("CONTEXT", "INPUT")[0]


@pytest.mark.parametrize(("name", "form"), [("passage_retrieval_en", "Paragraph 1"), ("passage_retrieval_zh", "段落1")])
def test_retrieval_asks_for_the_form_that_is_scored(name: str, form: str) -> None:
    assert form in TEMPLATES[name].render("", "")[1]


def test_newlines_are_real_and_braces_in_texts_mean_nothing() -> None:
    template = parse("Read {{}}:\n{context}\n\nQ: {input}\nA:")
    prompt, after = template.render("def f(): {input}", "{context}?")
    assert prompt == "Read {}:\ndef f(): {input}\n\nQ: {context}?\nA:"
    assert after == "\n\nQ: {context}?\nA:"
    assert all("\n" in template.render("", "")[0] for template in TEMPLATES.values())
    assert not any("\\n" in template.render("", "")[0] for template in TEMPLATES.values())


def test_input_may_come_first() -> None:
    assert parse("{input} {context}!").render("c", "i") == ("i c!", "!")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Q: {input}", r"has the fields \['input'\]"),
        ("{context} {context}", r"has the fields \['context', 'context'\]"),
        ("{context} {answers}", r"has the fields \['context', 'answers'\]"),
        ("{context:>9}", "plain {context} once"),
        ("{context!r}", "plain {context} once"),
        ("{context} {input", "{context} and {input} are its fields"),
    ],
)
def test_an_unusable_template_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse(text)
