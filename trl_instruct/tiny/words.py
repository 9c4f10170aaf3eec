"""The words of the tiny world: everything a reply may say."""

CATEGORIES: dict[str, tuple[str, ...]] = {
    category: tuple(nouns.split())
    for category, nouns in {
        "bird": "crow owl robin eagle hawk duck goose swan heron raven dove parrot stork wren gull",
        "flower": "rose lily tulip daisy iris poppy violet orchid lotus aster peony dahlia "
        "pansy crocus lilac",
        "fruit": "apple pear plum peach cherry grape lemon lime mango melon fig banana kiwi papaya "
        "quince",
        "city": "Rome Paris London Berlin Madrid Oslo Lima Cairo Tokyo Delhi Prague Dublin "
        "Athens Lisbon Boston",
        "tool": "hammer saw drill wrench chisel shovel rake axe hoe spade mallet sickle crowbar "
        "ladder anvil",
        "instrument": "piano violin flute drum harp guitar trumpet cello oboe tuba banjo horn "
        "organ lute fiddle",
    }.items()
}
CATEGORY_OF = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns}
NOUNS = tuple(CATEGORY_OF)

QUESTION_NOUNS = tuple(noun for nouns in CATEGORIES.values() for noun in nouns[:1])
"""The nouns asked about: one per category, so each occurs hundreds of times."""

BARE_CATEGORIES = ("city",)
"""Categories whose nouns take no article."""

COUNTS = {1: "one", 2: "two", 3: "three"}

TONES: dict[str, tuple[str, ...]] = {
    "politely": ("Of course!", "Certainly!", "Gladly!"),
    "cheerfully": ("Hooray!", "Wonderful!", "Great news!"),
    "sadly": ("Alas,", "Oh dear,", "Sorry,"),
    "angrily": ("Bah!", "Enough!", "Grr!"),
}
"""The openings that show each tone. After a comma the next word is not capitalized."""

_PLACES_TEXT = (
    "river hill garden bridge market forest lake tower road window gate field beach castle"
)
PLACES = tuple(_PLACES_TEXT.split())
"""The words an instruction may require; a reply uses one as in "near the river"."""

PREPOSITIONS = ("near", "by", "behind", "beside")
VERBS = ("sees", "likes", "finds", "meets", "follows", "watches", "needs", "loves")
CHATTER = ("That is all.", "Ask me again.", "I know a lot.", "And so on.")
"""What a flawed reply may add unasked."""
JUNK = ("blah", "foo", "zork", "um", "qux", "lol", "xx", "etc")
"""Words outside the world; only flawed replies have them."""


def with_article(word: str) -> str:
    """The indefinite article and a word.

    >>> with_article("owl"), with_article("rose")
    ('an owl', 'a rose')
    """
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def phrase(noun: str) -> str:
    """A noun as replies write it.

    >>> phrase("owl"), phrase("rose"), phrase("Rome")
    ('an owl', 'a rose', 'Rome')
    """
    return noun if CATEGORY_OF[noun] in BARE_CATEGORIES else with_article(noun)


def plural(category: str) -> str:
    """The plural of a category.

    >>> plural("city"), plural("rose")
    ('cities', 'roses')
    """
    return category[:-1] + "ies" if category.endswith("y") else category + "s"


def join_and(phrases: list[str]) -> str:
    """The phrases as an English enumeration.

    >>> join_and(["a rose", "a lily", "Rome"])
    'a rose, a lily and Rome'
    """
    *rest, last = phrases
    return f"{', '.join(rest)} and {last}" if rest else last


def capitalized(text: str) -> str:
    """The text with its first letter capitalized."""
    return text[:1].upper() + text[1:]
