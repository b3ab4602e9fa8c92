"""Messages of a chat found again among its tokens, whatever the template does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sdtp.pruning import scorers
from sdtp.pruning.chat import protect_messages
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

SPECIAL = ["[pad]", "[bos]", "[turn]", "[end]"]
TURNS = (
    "{% for m in messages %}[turn]{{ m['role'] + '\n' + m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[turn]assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}[turn]system\nBe brief.[end]\n{% endif %}" + TURNS
STRIPS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
# The system prompt becomes part of the first user message, as in Llama 2, or of the last one, as in Mistral.
IN_FIRST_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<' + messages[0]['content'] + '>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "[bos]INST {{ ((system if loop.first else '') + m['content']) | trim }} /INST"
    "{% else %} {{ m['content'] | trim }} [end]{% endif %}{% endfor %}"
)
IN_LAST_USER = (
    "[bos]{% for m in messages[1:] %}{% if m['role'] == 'user' %}"
    "[turn]{{ (messages[0]['content'] + '\n\n' if loop.last else '') + m['content'] }}[turn]"
    "{% else %}{{ m['content'] }}[end]{% endif %}{% endfor %}"
)

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Who is it?"}
ANSWER = {"role": "assistant", "content": "A man."}
AGAIN = {"role": "user", "content": "Why?"}


def make(
    template: str | None,
    merges: Sequence[tuple[str, str]] = (),
    adds_bos: bool = False,
    trims: bool = False,
    pad: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, but for `merges`."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="[bos] $A", special_tokens=[("[bos]", 1)])
    if trims:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrap(backend, template, pad)


def wrap(backend: Tokenizer, template: str | None, pad: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[bos]", pad_token="[pad]" if pad else None, chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def marked(tokenizer: PreTrainedTokenizerFast, messages: Any, row: int = 0, **arguments: Any) -> str:
    """The prompt as text, each run of protected tokens between « and »."""
    inputs, protect = protect_messages(tokenizer, messages, **arguments)
    assert protect.dtype == torch.bool
    assert protect.shape == inputs["input_ids"].shape == inputs["attention_mask"].shape
    ids, flags = inputs["input_ids"][row].tolist(), protect[row].tolist()
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or flags[i] != flags[start]:
            piece = tokenizer.decode(ids[start:i], clean_up_tokenization_spaces=False)
            text += f"«{piece}»" if flags[start] else piece
            start = i
    return text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            TURNS,
            "[turn]system\n«Be brief.»[end]\n[turn]user\nWho is it?[end]\n[turn]assistant\nA man.[end]\n"
            "[turn]user\n«Why?»[end]\n[turn]assistant\n",
        ),
        (STRIPS, "[bos][system]«Be brief.»[end][user]Who is it?[end][assistant]A man.[end][user]«Why?»[end]"),
        (IN_FIRST_USER, "[bos]INST <<«Be brief.»>>\n\nWho is it? /INST A man. [end][bos]INST «Why?» /INST"),
        (IN_LAST_USER, "[bos][turn]Who is it?[turn]A man.[end][turn]«Be brief.»\n\n«Why?»[turn]"),
    ],
    ids=["turns", "strips", "in first user", "in last user"],
)
def test_system_prompt_and_last_question_are_protected(template, expected):
    chat = [SYSTEM, ASK, ANSWER, AGAIN]
    assert marked(make(template), chat, add_generation_prompt=True) == expected


def test_first_question_that_holds_the_system_prompt():
    assert marked(make(IN_FIRST_USER), [SYSTEM, ASK]) == "[bos]INST <<«Be brief.»>>\n\n«Who is it?» /INST"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": (), "last": ()}, "[s]1[end][u]2[end][a]3[end][s]4[end][u]5[end][a]6[end]"),
        ({"every": ("u",), "last": ()}, "[s]1[end][u]«2»[end][a]3[end][s]4[end][u]«5»[end][a]6[end]"),
        ({"every": ("s",), "last": ["a", "u"]}, "[s]«1»[end][u]2[end][a]3[end][s]«4»[end][u]«5»[end][a]«6»[end]"),
        ({"every": ("a",), "last": ("a",)}, "[s]1[end][u]2[end][a]«3»[end][s]4[end][u]5[end][a]«6»[end]"),
        ({}, "[s]1[end][u]2[end][a]3[end][s]4[end][u]5[end][a]6[end]"),  # roles that nobody has
    ],
)
def test_roles_choose_messages(arguments, expected):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
    chat = [{"role": role, "content": str(i)} for i, role in enumerate("suasua", 1)]
    assert marked(make(template), chat, **arguments) == expected


def test_text_that_also_stands_elsewhere_is_found_in_its_own_message():
    quote = {"role": "user", "content": "Be brief."}
    assert marked(make(DEFAULT_SYSTEM), [quote]) == "[turn]system\nBe brief.[end]\n[turn]user\n«Be brief.»[end]\n"
    assert marked(make(TURNS), [quote, SYSTEM, quote], last=()) == (
        "[turn]user\nBe brief.[end]\n[turn]system\n«Be brief.»[end]\n[turn]user\nBe brief.[end]\n"
    )
    # The system prompt comes first in the chat, last in the text.
    assert marked(make(IN_LAST_USER), [SYSTEM, quote, ANSWER, AGAIN], last=()) == (
        "[bos][turn]Be brief.[turn]A man.[end][turn]«Be brief.»\n\nWhy?[turn]"
    )
    header = {"role": "user", "content": "user"}
    assert marked(make(TURNS), [header, ANSWER, header]) == (
        "[turn]user\nuser[end]\n[turn]assistant\nA man.[end]\n[turn]user\n«user»[end]\n"
    )


CONTENTS = st.lists(
    st.sampled_from(["Be brief.", "user", "system\n", "a", " ", "\n", "é", "字", "[end]", "\ue000", "  x\n\n"]),
    max_size=5,
).map("".join)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENTS), min_size=1, max_size=6)


@given(CHATS)
def test_every_chat_is_marked_where_its_messages_stand(chat):
    turns, strips = "", "[bos]"
    for i, (role, content) in enumerate(chat):
        chosen = role == "system" or (role == "user" and all(later != "user" for later, _ in chat[i + 1 :]))
        left, right = "«»" if chosen and content.strip() else ("", "")
        turns += f"[turn]{role}\n{left}{content}{right}[end]\n"
        strips += f"[{role}]{left}{content.strip()}{right}[end]"
    messages = [{"role": role, "content": content} for role, content in chat]
    assert marked(make(TURNS), messages) == turns
    assert marked(make(STRIPS), messages) == strips


def test_white_space_around_a_message_is_protected_where_the_template_prints_it():
    chat = [{"role": "user", "content": "\n  Why? \n"}]
    assert marked(make("{{ messages[0]['content'] }}!"), chat) == "«\n  Why? \n»!"
    assert marked(make("{{ messages[0]['content'] | trim }}!"), chat) == "«Why?»!"
    assert marked(make("{{ messages[0]['content'].rstrip() }}!"), chat) == "«\n  Why?»!"


def test_a_token_with_any_character_of_the_message_is_protected():
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}!{% endfor %}"
    tokenizer = make(template, merges=[(":", "W"), ("?", "!"), ("h", "y"), ("!", "u")])
    assert marked(tokenizer, [AGAIN]) == "user«:Why?!»"
    assert marked(tokenizer, [SYSTEM, AGAIN]) == "system:«Be brief.»!user«:Why?!»"
    assert marked(tokenizer, [SYSTEM, AGAIN], last=()) == "system:«Be brief.»!user:Why?!"


def test_spaces_that_offsets_leave_out_belong_to_the_message():
    chat = [{"role": "user", "content": "if x:\n    y"}]
    tokenizer = make("a    {{ messages[0]['content'] }}    b", merges=[("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")], trims=True)
    inputs = tokenizer("a    if x:\n    y    b", return_offsets_mapping=True)
    spaces = [span for token, span in zip(inputs.tokens(), inputs["offset_mapping"], strict=True) if token == "ĠĠĠĠ"]
    assert spaces == [(5, 5), (15, 15), (20, 20)]  # nothing of them is left
    assert marked(tokenizer, chat) == "a    «if x:\n    y»    b"


def test_other_kinds_of_tokenizers():
    words = ["[unk]", "▁Be", "▁brief", ".", "▁", "▁user", "▁Why", "?", ":", "▁system"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, *SPECIAL])}, unk_token="[unk]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(pattern=":", behavior="isolated")]
        + [pre_tokenizers.Split(pattern=mark, behavior="isolated") for mark in ".?"]
    )
    tokenizer = wrap(backend, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[end]{% endfor %}")
    chat = [{"role": "system", "content": "Be très brief."}, {"role": "user", "content": "Why e\u0301te\u0301?"}]
    inputs, protect = protect_messages(tokenizer, chat)
    tokens = " ".join(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]))
    assert tokens == "▁system : ▁Be [unk] ▁brief . [end] ▁user : ▁Why [unk] ? [end]"
    assert [i for i, flag in enumerate(protect[0].tolist()) if flag] == [2, 3, 4, 5, 9, 10, 11]


def test_ids_are_those_of_the_template_with_one_bos():
    tokenizer = make("[bos]" + TURNS, adds_bos=True)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    inputs, protect = protect_messages(tokenizer, [SYSTEM, ASK], add_generation_prompt=True)
    expected = tokenizer.apply_chat_template([SYSTEM, ASK], add_generation_prompt=True, return_dict=False)
    assert inputs["input_ids"].tolist() == [expected]
    assert expected.count(tokenizer.bos_token_id) == 1
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].all()
    assert protect.sum() == len("Be brief.") + len("Who is it?")


def test_a_batch_is_padded_on_the_left_and_each_row_is_what_it_is_alone():
    chats = [[AGAIN], [SYSTEM, ASK, ANSWER, AGAIN], [SYSTEM, ASK]]
    tokenizer = make(TURNS)
    tokenizer.padding_side = "right"  # the tokenizer's own habit does not matter
    inputs, protect = protect_messages(tokenizer, chats)
    assert tokenizer.padding_side == "right"
    alone = [protect_messages(tokenizer, chat) for chat in chats]
    lengths = [ids["input_ids"].shape[1] for ids, _ in alone]
    assert lengths[0] < lengths[2] < lengths[1] == inputs["input_ids"].shape[1]
    for row, (ids, mask) in enumerate(alone):
        padding = lengths[1] - lengths[row]
        assert inputs["attention_mask"][row].tolist() == [0] * padding + [1] * lengths[row]
        assert inputs["input_ids"][row, :padding].eq(tokenizer.pad_token_id).all()
        assert torch.equal(inputs["input_ids"][row, padding:], ids["input_ids"][0])
        assert not protect[row, :padding].any()
        assert torch.equal(protect[row, padding:], mask[0])
    assert [int(mask.sum()) for _, mask in alone] == [4, 13, 19]


def test_one_conversation_needs_no_padding_token():
    tokenizer = make(TURNS, pad=False)
    assert marked(tokenizer, [AGAIN]) == "[turn]user\n«Why?»[end]\n"
    with pytest.raises(ValueError, match="padding token"):
        protect_messages(tokenizer, [[AGAIN], [SYSTEM, AGAIN]])


def test_parts_of_text_are_one_string():
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    tokenizer = make(TURNS)
    inputs, protect = protect_messages(tokenizer, [SYSTEM, {"role": "user", "content": parts}])
    expected, mask = protect_messages(tokenizer, [SYSTEM, ASK])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(protect, mask)


def test_messages_without_text_have_nothing_to_protect():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] or m['tool_calls'][0]['name'] }}[end]{% endfor %}"
    )
    chat = [{"role": "system", "content": " \n"}, ASK, call]
    assert marked(make(template), chat, last=("user", "assistant")) == "[system] \n[end][user]«Who is it?»[end]" + (
        "[assistant]look[end]"
    )


def test_a_message_keeps_its_other_fields():
    template = "{% for m in messages %}[turn]{{ m['name'] }}: {{ m['content'] }}{% endfor %}"
    assert marked(make(template), [{**AGAIN, "name": "Ann"}]) == "[turn]Ann: «Why?»"


def test_templates_that_look_into_a_message_or_print_it_twice():
    looks = (
        "{% for m in messages %}{% if m['content'].startswith('<tool>') and m['content'].endswith('</tool>') %}"
        "[tool]{% else %}[turn]{% endif %}{{ m['content'] }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "<tool>7 degrees</tool>"}]
    assert marked(make(looks), chat) == "[tool]«<tool>7 degrees</tool>»"
    twice = "{{ messages[0]['content'] }}[turn]{{ messages[0]['content'] | trim }}[end]"
    assert marked(make(twice), [AGAIN]) == "«Why?»[turn]«Why?»[end]"


def test_arguments_reach_the_template():
    template = TURNS + "{% if thinking is defined %}<think>{% endif %}"
    assert marked(make(template), [AGAIN], add_generation_prompt=True, thinking=True) == (
        "[turn]user\n«Why?»[end]\n[turn]assistant\n<think>"
    )
    assert marked(make(TURNS), [AGAIN], chat_template="{{ messages[0]['content'] }}!") == "«Why?»!"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
        "{{ messages[0]['content'] | upper }}{{ messages[1]['content'] }}",
        "{{ messages[0]['content'][3:] }}{{ messages[1]['content'] }}",
        "{{ messages[0]['content'] }}[turn]{{ messages[0]['content'][3:] }}{{ messages[1]['content'] }}",
        "{{ messages[0]['content'] | length }}{{ messages[0]['content'] }}{{ messages[1]['content'] }}",
        "{{ {'Be brief.': 'Be brief.'}[messages[0]['content']] }}{{ messages[1]['content'] }}",
    ],
    ids=["dropped", "changed", "cut", "once whole, once cut", "counted", "looked up"],
)
def test_a_message_the_template_does_not_print_as_it_is_is_named(template):
    with pytest.raises(ValueError, match=r"messages\[0\] \(system\) is not found in the rendered chat"):
        protect_messages(make(template), [SYSTEM, AGAIN])
    assert protect_messages(make(template), [SYSTEM, AGAIN], every=())[1].sum() == len("Why?")
    with pytest.raises(ValueError, match=r"messages\[1\]\[0\] \(system\) is not found"):
        protect_messages(make(template), [[ASK, AGAIN], [SYSTEM, AGAIN]])


def test_a_place_that_only_looks_like_the_message_is_refused():
    """Marking the message lengthens the count before it, and one character further stand as many letters."""
    chat = [{"role": "user", "content": "a" * 9}]
    template = "{{ messages[0]['content'] | length }}:{{ messages[0]['content'] }}a"
    with pytest.raises(ValueError, match="is not found"):
        protect_messages(make(template), chat)


IMAGE = [{"type": "text", "text": "What is it?"}, {"type": "image", "url": "a.png"}]


@pytest.mark.parametrize(
    ("messages", "arguments", "words"),
    [
        ([], {}, r"messages is \[\]: a list of at least one"),
        ([[AGAIN], []], {}, r"messages\[1\] is \[\]: a list of at least one"),
        (AGAIN, {}, "messages is {'role': 'user'.*a list of at least one"),
        ([AGAIN, "Why?"], {}, r"messages\[1\] is 'Why\?': a mapping with a role and a content"),
        ([[AGAIN], [{"content": "Why?"}]], {}, r"messages\[1\]\[0\] is .*: a mapping with a role and a content"),
        ([{"role": "user", "content": 7}], {}, r"messages\[0\] has content of type int: a string or parts"),
        ([{"role": "user", "content": IMAGE}], {}, r"messages\[0\] has a part of type image: only"),
        ([{"role": "user", "content": ["Why?"]}], {}, r"messages\[0\] has a part of type str: only"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, r"messages\[0\] has a part of type text: only"),
        ([AGAIN], {"every": ("sytem",)}, r"every is \('sytem',\): .* assistant, developer, system, tool, user"),
        ([AGAIN], {"last": ("user", "bot")}, r"last is \('user', 'bot'\)"),
        ([AGAIN], {"every": "system"}, r"every is 'system': it must be a list of roles"),
        ([AGAIN], {"truncation": True, "max_length": 5}, "max_length, truncation: only arguments of the chat template"),
        ([AGAIN], {"tokenize": True}, "tokenize: only arguments"),
    ],
)
def test_wrong_use_is_named(messages, arguments, words):
    with pytest.raises(ValueError, match=words):
        protect_messages(make(TURNS), messages, **arguments)


def test_tokenizers_that_cannot_do_it_are_named():
    slow = ByT5Tokenizer()
    slow.chat_template = TURNS
    with pytest.raises(ValueError, match=r"ByT5Tokenizer does not know which characters .* fast tokenizer"):
        protect_messages(slow, [AGAIN])
    with pytest.raises(ValueError, match="chat_template is not set"):
        protect_messages(make(None), [AGAIN])


def test_a_pruner_keeps_the_chosen_messages(tiny_model):
    tokenizer = make(TURNS)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0)
    filler = {"role": "user", "content": "word " * 20}
    chats = [[SYSTEM, filler, ANSWER, AGAIN, ANSWER], [filler, ANSWER]]
    inputs, protect = protect_messages(tokenizer, chats, every=("system", "assistant"), last=())
    schedule = PruningSchedule((1, 3), budget=30, sinks=0, local=0.0, min_local=1)
    with TokenPruner(schedule, scorers.Random(0))(model, protect=protect) as trace:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    for row, mask in enumerate(protect):
        kept = trace.kept[-1][row]
        assert (kept >= 0).sum() == 30
        wanted = mask[inputs["attention_mask"][row].bool()].nonzero()[:, 0]
        assert len(wanted) == [21, 6][row]
        assert set(wanted.tolist()) <= set(kept.tolist())
