"""Multi-hop tracing: variables set to a value or to one another, here and there in a text."""

from __future__ import annotations

from itertools import pairwise

from sdtp.pipeline.ruler.layout import MIN_TEXT_TOKENS, Draft, Sheet, ask, piece, plant, room, size, without
from sdtp.pipeline.target_settings import RulerSettings
from sdtp.pipeline.tasks import cut_passage

_OPENING = "Here and there this text sets a variable. Keep track of their values.\n\nText:"
_VALUE = "Let {name} be {value}."
_COPY = "Let {name} have the value of {other}."
# Five letters each, so that no name is part of another, and none a vowel: no word of the text has one in it.
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
_NAME_LENGTH = 5
_VALUES = range(10_000, 100_000)


def variables(sheet: Sheet, settings: RulerSettings) -> Draft:
    """`settings.chains` chains, each in the order of the text; all names of the first are asked for by its value."""
    names = _names(sheet, settings.chains * (settings.hops + 1))
    values = [str(value) for value in sheet.rng.sample(_VALUES, settings.chains)]
    chains = [names[index :: settings.chains] for index in range(settings.chains)]
    # A chain's turns are shuffled among the others', its assignments keep their order.
    turns = [index for index, chain in enumerate(chains) for _ in chain]
    sheet.rng.shuffle(turns)
    coming = [iter(_assignments(chain, value)) for chain, value in zip(chains, values, strict=True)]
    facts = [piece(sheet, next(coming[turn])) for turn in turns]
    count = len(chains[0])
    asking = ask(
        sheet,
        _OPENING,
        f"Which {count} variables have the value {values[0]} in the end, directly or by way of others? Name them all.",
        f"The {count} variables with the value {values[0]} are",
        chains[0],
    )
    what = f"assignments ({len(facts)}) in {MIN_TEXT_TOKENS} tokens of text"
    left = room(sheet, asking, size(facts) + MIN_TEXT_TOKENS, what)
    text, sources = cut_passage(sheet.tokenizer, without(sheet.text, [*names, *values]), left - size(facts))
    return Draft(asking, plant(text, facts, sorted(sheet.rng.random() for _ in facts)), sources)


def _names(sheet: Sheet, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(sheet.rng.choices(_LETTERS, k=_NAME_LENGTH))] = None
    return list(names)


def _assignments(chain: list[str], value: str) -> list[str]:
    copies = [_COPY.format(name=name, other=other) for other, name in pairwise(chain)]
    return [_VALUE.format(name=chain[0], value=value), *copies]
