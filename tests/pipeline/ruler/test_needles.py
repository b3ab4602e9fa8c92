"""Planted facts: at their depths, of one form, told apart by what is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.prompts import decode, encode
from sdtp.pipeline.ruler import needles, profiles, variables, words
from tests.pipeline.conftest import TURNS
from tests.pipeline.ruler.material import documents, examples

Make = Callable[..., PreTrainedTokenizerBase]
FACT = re.compile(r"Whoever calls for (\w+) has to show the pass number (\d+)\.")


def test_single_fact_stands_at_the_depth_whose_turn_it_is(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    longest = max(len(encode(tokenizer, line)) for d in documents() for line in d.text.split("."))
    found = examples(tokenizer, "single", length=1500, count=10)
    assert [example.depth for example in found] == [0.0, 0.25, 0.5, 0.75, 1.0] * 2
    for example in found:
        assert example.depth is not None
        body = example.prompt[example.prompt.index("Text:") + 5 : example.prompt.index("\n\nQuestion")]
        (place,) = FACT.finditer(body)
        before, after = (len(encode(tokenizer, part)) for part in (body[: place.start()], body[place.end() :]))
        assert before / (before + after) == pytest.approx(example.depth, abs=(longest / 2 + 2) / (before + after))
        assert (before <= 1) == (example.depth == 0.0)  # a space alone stands before the first
        assert (after == 0) == (example.depth == 1.0)
        assert example.references == [place[2]]


def test_one_of_several_facts_of_the_same_form_is_asked_for(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    ranks = set()
    for example in examples(tokenizer, "multi_key", count=12):
        facts = FACT.findall(example.prompt)
        assert len(facts) == len(dict(facts)) == len({value for _, value in facts}) == 4
        reply = decode(tokenizer, example.prompt_ids).split("[turn]assistant\n")[1]
        asked = [value for name, value in facts if reply == f"Whoever calls for {name} has to show the pass number"]
        assert asked == example.references
        assert {len(value) for _, value in facts} == {7}
        assert example.depth is None
        ranks.add([value for _, value in facts].index(asked[0]))
    assert ranks == {0, 1, 2, 3}


def test_all_values_of_one_key_are_asked_for(make_tokenizer: Make) -> None:
    for example in examples(make_tokenizer(), "multi_value"):
        facts = FACT.findall(example.prompt)
        (name,) = {name for name, _ in facts}
        assert sorted(value for _, value in facts) == sorted(example.references)
        assert len(example.references) == 3
        assert f"3 pass numbers for {name}." in example.prompt


def test_values_of_all_keys_are_asked_for_in_the_order_of_the_question(make_tokenizer: Make) -> None:
    orders = set()
    for example in examples(make_tokenizer(), "multi_query", count=8):
        facts = dict(FACT.findall(example.prompt))
        names = re.search(r"for (\w+), (\w+) and (\w+), in this order", example.prompt)
        assert names is not None
        assert [facts[name] for name in names.groups()] == example.references
        assert len(facts) == 3
        orders.add(list(facts) == list(names.groups()))
    assert False in orders


def test_facts_are_planted_at_all_depths(make_tokenizer: Make) -> None:
    quarters = [0] * 4
    for example in examples(make_tokenizer(), "multi_key", count=15, length=1500):
        for match in FACT.finditer(example.prompt):
            quarters[int(4 * match.start() / len(example.prompt))] += 1
    assert min(quarters) >= 6  # 15 expected


def test_chains_keep_their_order_and_the_asked_one_is_told_by_its_value(make_tokenizer: Make) -> None:
    interleaved = 0
    for example in examples(make_tokenizer(), "variables", count=6):
        steps = re.findall(r"Let ([A-Z]{5}) (?:be|have the value of) (\w+)\.", example.prompt)
        assert len(steps) == 2 * (3 + 1)
        values: dict[str, str] = {}
        chain_of: list[str] = []
        for name, source in steps:
            assert name not in values
            assert source.isdigit() or source in values  # set before it is read
            values[name] = source if source.isdigit() else values[source]
            chain_of.append(values[name])
        asked = re.search(r"Which 4 variables have the value (\d{5})", example.prompt)
        assert asked is not None
        assert [name for name, value in values.items() if value == asked[1]] == example.references
        assert len(set(values.values())) == 2
        # Each name is read once at most: chains do not branch.
        assert len({source for _, source in steps}) == len(steps)
        interleaved += chain_of != sorted(chain_of, key=chain_of.index)
    assert interleaved


def test_no_phrasing_or_value_is_one_that_a_pruner_is_trained_on() -> None:
    trained = {value.lower() for kind in TRAIN.value_types for value in kind.values}
    planted = {value.lower() for trait in profiles._TRAITS for value in trait.values}
    assert not trained & planted
    assert not {value for kind in TEST.value_types for value in kind.values} & planted
    assert needles._KIND not in {kind.kind for kind in TRAIN.value_types}
    ours = {needles._FACT.fact, variables._VALUE, variables._COPY, words._OPENING}
    assert not {phrasing.fact for phrasing in TRAIN.phrasings} & ours
