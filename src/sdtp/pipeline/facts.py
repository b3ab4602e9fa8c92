"""Words and phrasings of the retrieval task: what a planted fact says, how it is asked for.

A fact gives one `entity` one `value` of one kind ("The badge colour of Clara is blue."). The two vocabularies below
share no phrasing, no kind of value, no value and no entity, so that a scorer tested on `TEST` has seen nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasing:
    """One way to state and to ask for a fact.

    `fact` holds {kind}, {entity} and, last, {value}. `question` may hold {kind}; it leaves the entity to the beginning
    of the model's reply, which repeats the fact up to its value. Small models answer so: a question that names the
    entity itself draws their attention from the fact to the question.
    """

    name: str
    fact: str
    question: str

    @property
    def answer(self) -> str:
        """How the reply begins: the fact up to where the value has to follow."""
        return self.fact[: self.fact.index(" {value}")]


@dataclass(frozen=True)
class ValueType:
    """A kind of value, as a noun phrase, with the values it can take (short words: one to three tokens)."""

    kind: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What retrieval examples of one split are made of."""

    phrasings: tuple[Phrasing, ...]
    value_types: tuple[ValueType, ...]
    entities: tuple[str, ...]

    @property
    def max_distractors(self) -> int:
        """Most distractors one example can hold: every fact needs an entity and a value of its own."""
        return min(len(self.entities), *(len(value_type.values) for value_type in self.value_types)) - 1


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


TRAIN = Vocabulary(
    phrasings=(
        Phrasing(
            "simple",
            "The {kind} for {entity} is {value}.",
            "Complete the sentence with the {kind}, as the text has it.",
        ),
        Phrasing("possessive", "{entity}'s {kind} is {value}.", "Which {kind} is it, according to the text?"),
        Phrasing(
            "chose",
            "As a {kind}, {entity} chose {value}.",
            "Look up the choice in the text and complete the sentence.",
        ),
        Phrasing(
            "recorded",
            "For {entity} the clerk recorded the {kind} {value}.",
            "Say which {kind} the clerk recorded.",
        ),
        Phrasing(
            "has",
            "It is known that the {kind} for {entity} is {value}.",
            "What is known? Answer in the words of the text.",
        ),
        Phrasing("given", "The {kind} given to {entity} was {value}.", "Which {kind} was given?"),
        Phrasing(
            "asked",
            "Asked about a {kind}, {entity} answered {value}.",
            "Repeat the answer that the text reports.",
        ),
        Phrasing("note", "A note says that the {kind} at {entity} became {value}.", "Quote the note on this {kind}."),
        Phrasing("belongs", "The {kind} that belongs to {entity} is {value}.", "Tell me the right {kind}."),
        Phrasing(
            "wrote",
            "In the column for {kind}, {entity} wrote {value}.",
            "Read the column for {kind} and fill in what was written.",
        ),
        Phrasing(
            "remembers",
            "The {kind} that people remember about {entity} is {value}.",
            "What do people remember? Finish the sentence.",
        ),
        Phrasing(
            "told",
            "We were told that the {kind} with {entity} would be {value}.",
            "Recall which {kind} we were told.",
        ),
        Phrasing(
            "register",
            "In the register, the {kind} under {entity} is {value}.",
            "Check the register and give the {kind}.",
        ),
        Phrasing("prefers", "When it comes to a {kind}, {entity} prefers {value}.", "Which {kind} is preferred?"),
    ),
    value_types=(
        ValueType(
            "city",
            _words(
                "Paris, London, Rome, Berlin, Madrid, Vienna, Dublin, Oslo, Cairo, Tokyo, Boston, Chicago, Denver, "
                "Seattle, Moscow, Athens, Lisbon, Prague, Sydney, Toronto, Milan, Dallas, Houston, Atlanta"
            ),
        ),
        ValueType(
            "country",
            _words(
                "France, Spain, Italy, Germany, Japan, China, Brazil, Mexico, Canada, Egypt, India, Kenya, Norway, "
                "Sweden, Poland, Greece, Turkey, Peru, Chile, Cuba, Ireland, Portugal, Finland, Iran"
            ),
        ),
        ValueType(
            "language",
            _words(
                "English, French, Spanish, German, Italian, Russian, Chinese, Japanese, Arabic, Greek, Latin, Hebrew, "
                "Turkish, Polish, Dutch, Swedish, Danish, Korean, Persian, Welsh"
            ),
        ),
        ValueType(
            "number",
            _words("12, 17, 23, 28, 31, 36, 39, 42, 47, 53, 58, 61, 64, 69, 72, 75, 78, 81, 84, 87, 93, 96"),
        ),
        ValueType(
            "food",
            _words(
                "bread, cheese, rice, honey, soup, apples, beans, butter, fish, chicken, pasta, cake, grapes, "
                "lemons, onions, peaches, corn, salad, chocolate, beef"
            ),
        ),
        ValueType(
            "profession",
            _words(
                "teacher, doctor, farmer, lawyer, painter, baker, sailor, carpenter, engineer, nurse, pilot, "
                "judge, writer, singer, soldier, tailor, barber, miner, butcher, librarian"
            ),
        ),
        ValueType(
            "instrument",
            _words(
                "piano, violin, guitar, drum, flute, trumpet, harp, organ, cello, clarinet, banjo, horn, lute, bell, "
                "whistle, trombone, saxophone, tuba, accordion, harmonica"
            ),
        ),
        ValueType(
            "tool",
            _words(
                "hammer, saw, knife, axe, shovel, needle, rope, ladder, lamp, brush, drill, hook, chain, wheel, "
                "bucket, broom, scissors, wrench, plow, mirror"
            ),
        ),
    ),
    entities=_words(
        "the lighthouse, the harbour, the library, the bakery, the mill, the station, the chapel, the orchard, "
        "the museum, the bridge, the hospital, the tavern, the castle, the market, the school, the garden, "
        "the theatre, the prison, the stable, the tower, the farm, the dock, the hotel, the bank"
    ),
)

TEST = Vocabulary(
    phrasings=(
        Phrasing(
            "ledger",
            "According to the ledger, the {kind} of {entity} is {value}.",
            "State the {kind} that the ledger mentions.",
        ),
        Phrasing(
            "years",
            "In those years the {kind} of {entity} was {value}.",
            "Search the text: what was the {kind} in those years?",
        ),
        Phrasing(
            "travellers",
            "Travellers report that the {kind} of {entity} is {value}.",
            "Someone asks for the {kind}. Give it to them.",
        ),
        Phrasing("first", "The first {kind} of {entity} was {value}.", "What came first? Use only the text."),
    ),
    value_types=(
        ValueType(
            "colour",
            _words(
                "red, blue, green, yellow, purple, orange, black, white, brown, pink, grey, violet, crimson, "
                "turquoise, beige, scarlet, indigo, amber, ivory, maroon"
            ),
        ),
        ValueType(
            "material",
            _words(
                "gold, silver, iron, copper, steel, glass, wood, stone, paper, leather, cotton, wool, silk, marble, "
                "clay, rubber, plastic, bronze, concrete, lead, brick, sand"
            ),
        ),
        ValueType(
            "animal",
            _words(
                "horse, dog, cat, wolf, bear, lion, tiger, rabbit, eagle, fox, sheep, goat, camel, elephant, "
                "monkey, snake, turtle, whale, deer, owl, duck, mouse"
            ),
        ),
        ValueType(
            "sport",
            _words(
                "football, tennis, golf, hockey, boxing, baseball, swimming, running, rowing, skating, cricket, "
                "basketball, rugby, fencing, wrestling, sailing, cycling, skiing, archery, volleyball"
            ),
        ),
    ),
    entities=_words(
        "Alice, Edward, Clara, Martin, Rosa, Henry, Julia, Peter, Emma, Walter, Laura, Oscar, Nora, Simon, Helen, "
        "Victor, Diana, Albert, Grace, Felix, Irene, Hugo, Martha, Leo, Sarah, Thomas, Anna, Robert, Lucy, Daniel"
    ),
)
