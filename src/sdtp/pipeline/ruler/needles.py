"""Retrieval: facts of one form planted in a text, of which one, several or all are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from sdtp.pipeline.facts import TEST, Phrasing
from sdtp.pipeline.ruler.layout import (
    MIN_TEXT_TOKENS,
    Asking,
    Draft,
    Sheet,
    ask,
    piece,
    plant,
    room,
    size,
    without,
)
from sdtp.pipeline.target_settings import RulerSettings
from sdtp.pipeline.tasks import cut_passage

_KIND = "pass number"
_FACT = Phrasing(
    "pass",
    "Whoever calls for {entity} has to show the {kind} {value}.",
    "Which {kind} does a caller have to show? Look it up in the text.",
)
_OPENING = "You will be asked about the {kind}s that this text mentions.\n\nText:"
# Seven digits each, so that no value is part of another.
_VALUES = range(1_000_000, 10_000_000)


def single(sheet: Sheet, settings: RulerSettings) -> Draft:
    """One fact, at the depth whose turn it is."""
    depth = settings.depths[sheet.number % len(settings.depths)]
    (entity,), values = _draw(sheet, 1, 1)
    return _draft(sheet, _one(sheet, entity, values), [entity], values, [depth], depth)


def multi_key(sheet: Sheet, settings: RulerSettings) -> Draft:
    """`settings.keys` facts about as many people, one of which is asked for."""
    entities, values = _draw(sheet, settings.keys, settings.keys)
    return _draft(sheet, _one(sheet, entities[0], values), entities, values, _depths(sheet, settings.keys))


def multi_value(sheet: Sheet, settings: RulerSettings) -> Draft:
    """`settings.values` facts about one person, all asked for."""
    (entity,), values = _draw(sheet, 1, settings.values)
    question = f"The text mentions {len(values)} {_KIND}s for {entity}. List them all."
    asking = ask(sheet, _opening(), question, f"The {_KIND}s for {entity} are", values)
    return _draft(sheet, asking, [entity] * len(values), values, _depths(sheet, len(values)))


def multi_query(sheet: Sheet, settings: RulerSettings) -> Draft:
    """`settings.queries` facts about as many people, all asked for, in another order than that of the text."""
    entities, values = _draw(sheet, settings.queries, settings.queries)
    people = f"{', '.join(entities[:-1])} and {entities[-1]}"
    question = f"Give the {_KIND}s for {people}, in this order."
    asking = ask(sheet, _opening(), question, f"The {_KIND}s for {people} are", values)
    return _draft(sheet, asking, entities, values, _depths(sheet, len(values)))


def _draw(sheet: Sheet, entities: int, values: int) -> tuple[list[str], list[str]]:
    return sheet.rng.sample(TEST.entities, entities), [str(value) for value in sheet.rng.sample(_VALUES, values)]


def _depths(sheet: Sheet, count: int) -> list[float]:
    return sorted(sheet.rng.random() for _ in range(count))


def _opening() -> str:
    return _OPENING.format(kind=_KIND)


def _one(sheet: Sheet, entity: str, values: Sequence[str]) -> Asking:
    """The first value, about `entity`, is asked for; the reply begins as its fact does."""
    answer = _FACT.answer.format(kind=_KIND, entity=entity)
    return ask(sheet, _opening(), _FACT.question.format(kind=_KIND), answer, values[:1])


def _draft(
    sheet: Sheet,
    asking: Asking,
    entities: Sequence[str],
    values: Sequence[str],
    depths: Sequence[float],
    depth: float | None = None,
) -> Draft:
    facts = [
        piece(sheet, _FACT.fact.format(kind=_KIND, entity=entity, value=value))
        for entity, value in zip(entities, values, strict=True)
    ]
    sheet.rng.shuffle(facts)
    left = room(
        sheet, asking, size(facts) + MIN_TEXT_TOKENS, f"facts ({len(facts)}) in {MIN_TEXT_TOKENS} tokens of text"
    )
    text, sources = cut_passage(sheet.tokenizer, without(sheet.text, values), left - size(facts))
    return Draft(asking, plant(text, facts, depths), sources, depth)
