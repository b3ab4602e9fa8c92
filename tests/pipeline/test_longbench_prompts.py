"""Prompts of LongBench: template tokens counted, the middle cut out of ids, one BOS at most, the question whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdtp.errors import UserError
from sdtp.evaluation.longbench.references import Reference
from sdtp.evaluation.longbench.tasks import TASKS
from sdtp.evaluation.longbench.templates import TEMPLATES, Template, parse
from sdtp.pipeline.longbench_data import Example
from sdtp.pipeline.longbench_prompts import longbench_prompt, read_templates
from sdtp.pipeline.prompts import decode, encode, frame
from tests.pipeline.conftest import CORPUS, TURNS

Make = Callable[..., PreTrainedTokenizerBase]
WORDS = "the city of Washington and the United States; " * 40
PLAIN = parse("Read the text.\n{context}\n\nQuestion: {input}\nAnswer:")


def example(task: str = "qasper", context: str = WORDS, question: str = "What is the value?") -> Example:
    return Example("1", task, context, question, Reference(("word",)), f"{task}.jsonl, line 3")


def test_the_middle_is_cut_out_of_ids(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    text = "0123456789"
    ids = encode(tokenizer, text)
    assert len(ids) == 10  # a digit is a token
    prompt = longbench_prompt(tokenizer, example("lcc", text), parse("{context}"), 6)
    assert (decode(tokenizer, prompt.ids), prompt.tokens_cut) == ("012789", 4)
    prompt = longbench_prompt(tokenizer, example("lcc", text), parse("{context}"), 5)
    assert (decode(tokenizer, prompt.ids), prompt.tokens_cut) == ("01789", 5)  # the odd one at the end
    assert longbench_prompt(tokenizer, example("lcc", text), parse("{context}"), 10).ids == ids


@pytest.mark.parametrize(
    ("adds_bos", "template"),
    [(True, None), (False, None), (True, TURNS), (False, TURNS), (True, "[bos]" + TURNS)],
    ids=["BOS", "none", "BOS, template without", "none, template without", "BOS of both"],
)
@pytest.mark.parametrize("task", ["qasper", "trec", "repobench-p"])
def test_limit_counts_everything_and_bos_is_there_once_at_most(
    make_tokenizer: Make, adds_bos: bool, template: str | None, task: str
) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    chat = task == "qasper" and template is not None
    around = frame(tokenizer, chat=chat)
    text, after = PLAIN.render(WORDS, "What is the value?")
    inner = encode(tokenizer, text)
    for limit in range(len(around) + 2 * len(encode(tokenizer, after)), len(around) + len(inner) + 3, 7):
        prompt = longbench_prompt(tokenizer, example(task), PLAIN, limit)
        room = limit - len(around)
        assert len(prompt.ids) == min(limit, len(around) + len(inner))
        assert prompt.tokens_cut == max(0, len(inner) - room)
        assert prompt.ids[: len(around.head)] == around.head
        assert prompt.ids[len(prompt.ids) - len(around.tail) :] == around.tail
        kept = prompt.ids[len(around.head) : len(prompt.ids) - len(around.tail)]
        assert kept == (inner[: room // 2] + inner[-(room - room // 2) :] if prompt.tokens_cut else inner)
        assert decode(tokenizer, kept).endswith(after)
        # The tokenizer's own, or the chat template's; never both.
        expected = 1 if (("[bos]" in str(template)) if chat else adds_bos) else 0
        assert prompt.ids.count(tokenizer.convert_tokens_to_ids("[bos]")) == expected
        assert (tokenizer.convert_tokens_to_ids("[turn]") in prompt.ids) == chat == prompt.chat


@pytest.mark.parametrize("name", TASKS)
def test_chat_template_is_for_the_tasks_that_ask(make_tokenizer: Make, name: str) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    question = "Question: What is the value?"
    prompt = longbench_prompt(tokenizer, example(name, "Text.", question), TEMPLATES[name], 2000)
    text = TEMPLATES[name].render("Text.", question)[0]
    chat = name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    assert decode(tokenizer, prompt.ids) == (f"[turn]user\n{text}[end]\n[turn]assistant\n" if chat else text)
    assert (prompt.chat, prompt.id, prompt.task) == (chat, "1", name)


def test_uncut_completion_is_what_the_tokenizer_itself_makes(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="[bos]" + TURNS)
    prompt = longbench_prompt(tokenizer, example("trec", "word"), PLAIN, 1000)
    assert prompt.ids == tokenizer(PLAIN.render("word", "What is the value?")[0])["input_ids"]


@pytest.mark.parametrize("template", [None, TURNS])
def test_a_question_that_would_be_cut_is_refused(make_tokenizer: Make, template: str | None) -> None:
    tokenizer = make_tokenizer(template=template)
    around = len(frame(tokenizer, chat=template is not None))
    asked = len(encode(tokenizer, PLAIN.render("", "What is the value?")[1]))
    prompt = longbench_prompt(
        tokenizer, example(), PLAIN, around + 2 * asked - 1
    )  # room for it, and for one less before
    assert len(prompt.ids) == around + 2 * asked - 1
    limit = around + 2 * asked - 2
    with pytest.raises(UserError) as raised:
        longbench_prompt(tokenizer, example(), PLAIN, limit)
    assert str(raised.value) == (
        f"qasper.jsonl, line 3: what comes after the context has {asked} tokens, the end of a prompt of {limit} tokens "
        f"has room for {asked - 1}: the question would be cut"
    )
    # What is to be continued may be long itself, and its end is what matters.
    assert len(longbench_prompt(tokenizer, example("triviaqa"), PLAIN, limit).ids) == limit
    # Nothing is cut of a short prompt, however small its room.
    short = longbench_prompt(tokenizer, example(context="a"), parse("{context}\n{input}"), 1000)
    assert (
        longbench_prompt(tokenizer, example(context="a"), parse("{context}\n{input}"), len(short.ids)).ids == short.ids
    )


@pytest.mark.parametrize("question", ["", " \n"])
def test_a_blank_question_is_refused_where_one_is_asked(make_tokenizer: Make, question: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match=r"qasper\.jsonl, line 3: field 'input' is .*; the template of qasper needs a"):
        longbench_prompt(tokenizer, example(question=question), TEMPLATES["qasper"], 1000)
    assert longbench_prompt(tokenizer, example("lcc", question=question), TEMPLATES["lcc"], 1000).ids


@pytest.mark.parametrize(("task", "template"), [("qasper", TURNS), ("trec", TURNS), ("qasper", None)])
def test_a_limit_without_room_is_refused(make_tokenizer: Make, task: str, template: str | None) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template=template)
    around = len(frame(tokenizer, chat=task == "qasper" and template is not None))
    with pytest.raises(
        UserError, match=rf"{around + 1} tokens are no room for a prompt of {task}: {around} are around"
    ):
        longbench_prompt(tokenizer, example(task), PLAIN, around + 1)


def test_a_folder_of_official_templates_takes_the_place_of_ours(tmp_path: Path, make_tokenizer: Make) -> None:
    texts = {"qasper": "Q {input}\n{context}", "trec": "{context}{input}", "nq": "{question}"}
    (tmp_path / "dataset2prompt.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(texts).encode())
    templates = read_templates(tmp_path, ["trec", "qasper"])
    assert templates == {
        "trec": Template((("", "context"), ("", "input"))),
        "qasper": Template((("Q ", "input"), ("\n", "context"))),
    }
    prompt = longbench_prompt(make_tokenizer(), example("trec", "In ", "Paris"), templates["trec"], 1000)
    assert decode(make_tokenizer(), prompt.ids) == "In Paris"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "no such file; a JSON object of a template a task is needed"),
        ("{", "Expecting property name"),
        ("[]", "it holds a list; a JSON object of a template a task is needed"),
        ("{}", r"key 'qasper' is None; a template with \{context\} is needed"),
        ('{"qasper": ["{context}"]}', r"key 'qasper' is \['\{context\}'\]; a template with \{context\} is needed"),
        ('{"qasper": "{input}"}', r"key 'qasper': template '\{input\}' has the fields \['input'\]"),
    ],
)
def test_unusable_templates_are_named_by_file_and_key(tmp_path: Path, content: str | None, error: str) -> None:
    if content is not None:
        (tmp_path / "dataset2prompt.json").write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/dataset2prompt\.json: {error}"):
        read_templates(tmp_path, ["qasper"])


@pytest.mark.parametrize(
    ("adds_bos", "template"), [(True, None), (False, None), (False, TURNS), (True, "[bos]" + TURNS)]
)
@pytest.mark.parametrize("task", ["qasper", "trec"])
def test_context_is_what_stands_between_the_templates_texts(
    make_tokenizer: Make, adds_bos: bool, template: str | None, task: str
) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    chat = task == "qasper" and template is not None
    bos, opening = "[bos]" if adds_bos else "", "[turn]user\n" if chat else ""
    closing = "[end]\n[turn]assistant\n" if chat else ""
    whole = longbench_prompt(tokenizer, example(task), PLAIN, 10_000)
    # With room for all of it, and with its middle cut out.
    for limit in (10_000, len(whole.ids) - 1, 200, 201):
        prompt = longbench_prompt(tokenizer, example(task), PLAIN, limit)
        start, end = prompt.context
        ids = prompt.ids
        assert decode(tokenizer, ids[:start]) == f"{bos}{opening}Read the text.\n"
        assert decode(tokenizer, ids[end:]) == f"\n\nQuestion: What is the value?\nAnswer:{closing}"
        text = decode(tokenizer, ids[start:end])
        assert (text == WORDS) is (prompt.tokens_cut == 0)
        assert text.startswith("the city of")
        assert text.endswith("United States; ")


def test_token_that_context_and_template_share_is_of_the_context(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    template = parse("Wash{context}and on")
    text = "ington met the count"
    # One token is "Washington", which neither side has alone.
    assert len(encode(tokenizer, "Washington")) < len(encode(tokenizer, "Wash")) + len(encode(tokenizer, "ington"))
    prompt = longbench_prompt(tokenizer, example("lcc", text), template, 100)
    start, end = prompt.context
    assert decode(tokenizer, prompt.ids) == "Washington met the countand on"
    assert text in decode(tokenizer, prompt.ids[start:end])


def test_cut_that_reaches_into_what_follows_leaves_the_rest_of_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    prompt = longbench_prompt(tokenizer, example("lcc", "0123456789"), parse("{context}9876543210"), 6)
    assert decode(tokenizer, prompt.ids) == "012210"
    assert prompt.context == (0, 3)


@pytest.mark.parametrize("task", ["qasper", "trec"])
def test_context_is_found_where_every_text_begins_with_a_space(task: str) -> None:
    """As tokenizers of the Llama 2 kind: a text alone has other first ids than inside another one."""
    backend = Tokenizer(models.BPE(unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["[unk]", "[turn]", "[end]"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*CORPUS, "user\nassistant\n\nQuestion: value?\nAnswer: ;"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]")
    tokenizer.chat_template = TURNS
    assert (
        encode(tokenizer, "a text")[:1]
        != encode(tokenizer, "[turn]user\na text")[-len(encode(tokenizer, "a text")) :][:1]
    )
    whole = longbench_prompt(tokenizer, example(task), PLAIN, 10_000)
    for limit in (10_000, len(whole.ids) - 1, 200):
        prompt = longbench_prompt(tokenizer, example(task), PLAIN, limit)
        start, end = prompt.context
        assert decode(tokenizer, prompt.ids[:start]).endswith("Read the text.\n")
        assert decode(tokenizer, prompt.ids[start:end]).lstrip().startswith("the city of")
        assert decode(tokenizer, prompt.ids[start:end]).rstrip().endswith("States;")
        assert "Question: What is the value?" in decode(tokenizer, prompt.ids[end:])


def test_a_prompt_without_any_of_its_context_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    template = parse("Read the text, all of it. " * 20 + "{context}\n\nQuestion: {input}\nAnswer:")
    asked = len(encode(tokenizer, template.render("", "What is the value?")[1]))
    around = len(frame(tokenizer, chat=False))
    prompt = longbench_prompt(tokenizer, example(), template, around + 2 * asked + 6)  # of the context three at the end
    assert 1 <= prompt.context[1] - prompt.context[0] <= 3
    with pytest.raises(UserError) as raised:
        longbench_prompt(tokenizer, example(), template, around + 2 * asked)
    assert str(raised.value) == (
        f"qasper.jsonl, line 3: a prompt of {around + 2 * asked} tokens has room for none of the context: what comes "
        "before and after it fills them"
    )
