"""Words and phrasings of the retrieval task: what a planted fact says, how it is asked for.

A fact gives one `entity` one `value` of one kind ("The badge colour of Clara is blue."). The two vocabularies below
share no phrasing, no kind of value, no value and no entity, so that a scorer tested on `TEST` has seen nothing of it.

Values are of one word or of several. The first token of an answer is found in the prompt before it is spoken, and the
last layers have no more use of the fact then; for what follows they look it up again. A scorer that has seen one-word
answers alone takes from the last layers what a longer one needs.
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
    """A kind of value, as a noun phrase, with the values it can take."""

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
        ValueType(
            "serial number",
            _words(
                "48213, 90417, 27365, 61582, 35094, 82746, 14938, 73601, 56279, 20853, 418527, 967034, 253186, 780945, "
                "136472, 594318, 801269, 342750, 675893, 129604"
            ),
        ),
        ValueType(
            "date",
            _words(
                "3 March 1871, 17 June 1804, 29 October 1932, 8 January 1899, 21 May 1846, 12 August 1917, "
                "5 April 1783, 30 November 1865, 14 February 1928, 26 September 1811, 9 July 1890, 19 December 1854, "
                "2 May 1941, 23 January 1838, 11 October 1876, 6 June 1795, 28 March 1903, 16 August 1829, "
                "4 December 1919, 13 November 1887"
            ),
        ),
        ValueType(
            "keeper",
            _words(
                "Margaret Lewis, Samuel Porter, Agnes Holloway, Julian Frost, Beatrice Nolan, Rupert Dawson, "
                "Cecilia Grant, Harold Finch, Matilda Rhodes, Gilbert Stone, Eleanor Pike, Wilfred Marsh, "
                "Rosalind Ames, Bernard Locke, Florence Webb, Clement Hardy, Sylvia Barton, Ernest Quill, "
                "Theresa Vaughn, Conrad Blythe"
            ),
        ),
        ValueType(
            "address",
            _words(
                "27 Mill Lane, 4 Chapel Street, 112 River Road, 63 Orchard Avenue, 8 Quarry Hill, 35 Abbey Close, "
                "91 Harbour Walk, 19 Meadow Court, 240 Station Road, 52 Garden Row, 76 Castle Street, 11 Bridge End, "
                "138 Forest Drive, 45 Tanner Square, 83 Church Lane, 20 Windmill Way, 317 Canal Street, "
                "6 Market Place, 59 Bishop Gate, 104 Hazel Grove"
            ),
        ),
        ValueType(
            "code",
            _words(
                "K7-RM-42, B3-XT-91, Q8-LN-16, D5-VK-73, H2-PW-58, Z9-CF-27, M4-GS-85, T6-JD-30, W1-BH-64, F8-QY-12, "
                "N3-ZL-79, R5-TE-46, C7-MU-93, J2-KP-08, V6-SA-51, L9-DW-35, X4-HN-82, G1-FR-67, P8-UC-24, S3-YB-70"
            ),
        ),
        ValueType(
            "motto",
            _words(
                "patience before pride, work and wait, truth without fear, never look back, one step further, "
                "hope against hope, speak when asked, mercy over might, steady as stone, give and forgive, "
                "light in darkness, few words suffice, always at sea, bend but stand, learn by losing, "
                "peace through trade, first to help, courage costs nothing, time tells all, plain and honest"
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
        ValueType(
            "telephone number",
            _words(
                "48-203-917, 71-546-280, 19-862-453, 63-097-518, 85-314-726, 27-639-041, 90-158-372, 36-472-809, "
                "54-921-637, 12-785-064, 78-360-295, 41-038-576, 67-594-183, 23-817-940, 99-246-701, 58-103-462, "
                "30-679-815, 84-752-039, 15-408-627, 72-931-508"
            ),
        ),
        ValueType(
            "favourite book",
            _words(
                "The Silent Valley, A Winter in Siberia, Letters to Nobody, The Clockmaker's Daughter, "
                "Beyond the Salt Marsh, Seven Empty Rooms, The Last Ferry Home, A Theory of Rain, The Orphan of Ghent, "
                "Under Copper Skies, The Botanist's War, Night Train to Tangier, The Weight of Snow, "
                "An Honest Forgery, Children of the Delta, The Glass Ladder, No Road North, The Beekeeper's Ledger, "
                "Half a Kingdom, The Map Without Names"
            ),
        ),
        ValueType(
            "password",
            _words(
                "seven quiet rivers, broken candle moon, tall velvet door, hungry paper kite, frozen summer bell, "
                "lost silver thimble, brave little engine, hollow oak feather, distant thunder song, "
                "crooked garden wall, sleepy harvest crow, hidden pocket watch, gentle desert wind, rusty iron anchor, "
                "bright copper coin, narrow forest path, sudden autumn storm, lonely harbour light, "
                "painted wooden horse, early morning ferry"
            ),
        ),
        ValueType(
            "debt",
            _words(
                "3450 crowns, 718 pounds, 12600 francs, 94 guilders, 5275 marks, 860 rubles, 41300 lire, 1925 pesos, "
                "637 crowns, 8080 pounds, 249 francs, 16750 guilders, 503 marks, 7140 rubles, 2815 lire, 96400 pesos, "
                "1360 pounds, 4590 francs, 372 guilders, 10220 marks"
            ),
        ),
    ),
    entities=_words(
        "Alice, Edward, Clara, Martin, Rosa, Henry, Julia, Peter, Emma, Walter, Laura, Oscar, Nora, Simon, Helen, "
        "Victor, Diana, Albert, Grace, Felix, Irene, Hugo, Martha, Leo, Sarah, Thomas, Anna, Robert, Lucy, Daniel"
    ),
)
