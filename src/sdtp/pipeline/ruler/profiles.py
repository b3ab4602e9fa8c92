"""Passages for question answering without a data set: invented people, four facts each, asked for in other words."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sdtp.pipeline.facts import TEST


@dataclass(frozen=True)
class Passage:
    """A text, a question that it answers, every way the answer may be written, and how the reply to it begins."""

    text: str
    question: str
    answers: tuple[str, ...]
    reply: str


@dataclass(frozen=True)
class _Trait:
    """One fact about a person: {name} and {value} in `fact`, {name} in `question` and `reply`, in other words.

    Small models answer where the reply says what has to follow.
    """

    fact: str
    question: str
    reply: str
    values: tuple[str, ...]


# fmt: off
_SURNAMES = (
    "Ashdown", "Barlow", "Caldecott", "Dunmore", "Ellery", "Farnham", "Gainsford", "Hargrave",
    "Ingleby", "Jessop", "Kimbrough", "Lockhart", "Merriweather", "Norwood", "Ormsby", "Penhallow",
    "Quimby", "Radcliffe", "Sedgwick", "Thornbury", "Umberland", "Vickery", "Wexford", "Yardley",
)
# fmt: on
# Values are of kinds that no other task plants, and occur in none of the sentences.
_TRAITS = (
    _Trait(
        "{name} spent a childhood on the banks of the {value}.",
        "Beside which river did {name} grow up?",
        "The river that {name} grew up by is the",
        ("Danube", "Volga", "Thames", "Ganges", "Mekong", "Tigris", "Zambezi", "Orinoco", "Loire", "Elbe", "Tiber"),
    ),
    _Trait(
        "In front of the house {name} plants nothing but the {value}.",
        "What flower grows in the garden of {name}?",
        "The flower that grows in the garden of {name} is the",
        ("tulip", "daffodil", "orchid", "peony", "lavender", "marigold", "hyacinth", "dahlia", "begonia", "primrose"),
    ),
    _Trait(
        "When there is a band, {name} asks for a {value}.",
        "Which dance does {name} like best?",
        "The dance that {name} likes best is the",
        ("waltz", "tango", "polka", "foxtrot", "rumba", "quadrille", "mazurka", "minuet", "bolero", "flamenco"),
    ),
    _Trait(
        "Guests of {name} are shown a ring with a large {value} in it.",
        "What stone does {name} own?",
        "The stone that {name} owns is the",
        ("diamond", "emerald", "sapphire", "garnet", "topaz", "zircon", "moonstone", "peridot", "citrine"),
    ),
)
MOST_PEOPLE = len(TEST.entities) * len(_SURNAMES)


def profiles(rng: random.Random, others: int) -> list[Passage]:
    """A passage with its question, first, and `others` (below `MOST_PEOPLE`) that do not contain its answer."""
    people = rng.sample(range(MOST_PEOPLE), others + 1)
    names = [
        f"{TEST.entities[person % len(TEST.entities)]} {_SURNAMES[person // len(TEST.entities)]}" for person in people
    ]
    asked = rng.choice(_TRAITS)
    answer = rng.choice(asked.values)
    made = []
    for number, name in enumerate(names):
        values = [rng.choice([value for value in trait.values if value != answer]) for trait in _TRAITS]
        if number == 0:
            values[_TRAITS.index(asked)] = answer
        facts = [trait.fact.format(name=name, value=value) for trait, value in zip(_TRAITS, values, strict=True)]
        rng.shuffle(facts)
        own = values[_TRAITS.index(asked)]
        made.append(Passage(" ".join(facts), asked.question.format(name=name), (own,), asked.reply.format(name=name)))
    return made
