"""The words of the tiny world: everything a reply may say, from world.yaml."""

from pathlib import Path
from typing import Any

import yaml

_TEXT = Path(__file__).with_name("world.yaml").read_text(encoding="utf-8")
WORLD: dict[str, Any] = yaml.safe_load(_TEXT)
CATEGORIES: dict[str, list[str]] = {k: nouns.split() for k, nouns in WORLD["categories"].items()}
CATEGORY_OF = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns}
NOUNS = list(CATEGORY_OF)
QUESTION_NOUNS = [nouns[0] for nouns in CATEGORIES.values()]
TONES: dict[str, list[str]] = WORLD["tones"]
PLACES, PREPOSITIONS = WORLD["places"].split(), WORLD["prepositions"].split()
VERBS, JUNK = WORLD["verbs"].split(), WORLD["junk"].split()
CHATTER: list[str] = WORLD["chatter"]


def with_article(word: str) -> str:
    """The indefinite article and a word."""
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def phrase(noun: str) -> str:
    """A noun as replies write it."""
    return noun if CATEGORY_OF[noun] in WORLD["without_article"] else with_article(noun)


def plural(category: str) -> str:
    """The plural of a category."""
    return category[:-1] + "ies" if category.endswith("y") else category + "s"


def join_and(phrases: list[str]) -> str:
    """The phrases as an English enumeration."""
    *rest, last = phrases
    return f"{', '.join(rest)} and {last}" if rest else last
