"""The tiny world of world.yaml: its words, what a task asks, its text, and how tasks are drawn."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

WORLD = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
CATEGORIES: dict[str, list[str]] = {k: nouns.split() for k, nouns in WORLD["categories"].items()}
CATEGORY_OF = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns}
NOUNS = list(CATEGORY_OF)
QUESTION_NOUNS = [nouns[0] for nouns in CATEGORIES.values()]
TONES: dict[str, list[str]] = WORLD["tones"]
PLACES, PREPOSITIONS = WORLD["places"].split(), WORLD["prepositions"].split()
VERBS, JUNK = WORLD["verbs"].split(), WORLD["junk"].split()
CHATTER: list[str] = WORLD["chatter"]
INSTRUCTIONS: dict[str, list[str]] = WORLD["instructions"]
FORMATS = list(INSTRUCTIONS)
FORMAT_WEIGHTS = [WORLD["format_weights"][name] for name in FORMATS]
COUNTS: dict[int, str] = WORLD["counts"]
WORD_CLAUSES: list[str] = WORLD["word_clauses"]
WORDINGS = len(WORD_CLAUSES)  # paraphrases of every instruction
SHARES: dict[str, float] = WORLD["shares"]


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


@dataclass(frozen=True)
class Task:
    """What one instruction asks for, in one of `WORDINGS` paraphrases.

    In format ``list``, ``dashes`` or ``sentence``: ``groups`` of (category, count) items, perhaps a
    tone of ``TONES`` and a ``word`` to use; in ``answer``: whether ``noun`` is a ``category``.

    >>> Task("list", groups=(("flower", 1), ("city", 1)), tone="politely", word="hill").prompt
    'Name one flower and one city, politely. Use the word hill.\\n'
    >>> Task("answer", noun="rose", category="tool").prompt
    'Is a rose a tool? Answer with a reason.\\n'
    """

    format: str
    groups: tuple[tuple[str, int], ...] = ()
    tone: str = ""
    word: str = ""
    noun: str = ""
    category: str = ""
    wording: int = 0

    @property
    def prompt(self) -> str:
        """The instruction; a byte-level tokenizer always splits after its final newline."""
        groups = [f"{COUNTS[n]} {name if n == 1 else plural(name)}" for name, n in self.groups]
        blanks = {"tone": self.tone and f", {self.tone}", "groups": groups and join_and(groups)}
        if self.noun:
            blanks |= {"noun": phrase(self.noun), "category": with_article(self.category)}
        text = INSTRUCTIONS[self.format][self.wording].format(**blanks)
        if self.word:
            text += " " + WORD_CLAUSES[self.wording].format(word=self.word)
        return text + "\n"

    def to_json(self) -> str:
        """The task as one line of json, for a dataset column."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task that :meth:`to_json` wrote."""
        fields = json.loads(text)
        groups = tuple((category, count) for category, count in fields.pop("groups"))
        return cls(groups=groups, **fields)

    @property
    def true_category(self) -> str:
        """The true category of the noun asked about."""
        return CATEGORY_OF[self.noun]

    @property
    def answer(self) -> str:
        """The right answer to a question: "yes" or "no"."""
        return "yes" if self.category == self.true_category else "no"


def sample_task(rng: random.Random) -> Task:
    """Sample a task; only the rng decides which."""
    (task_format,) = rng.choices(FORMATS, FORMAT_WEIGHTS)
    tone = rng.choice(tuple(TONES)) if rng.random() < SHARES["tone"] else ""
    wording = rng.randrange(WORDINGS)
    if task_format == "answer":
        return _sample_question(tone, wording, rng)
    groups = _sample_groups(1 + (rng.random() < SHARES["two_groups"]), rng)
    while task_format == "sentence" and sum(count for _, count in groups) < 2:
        groups = _sample_groups(1, rng)
    # A single group with neither tone nor word would give half the score for the format alone.
    needs_word = len(groups) == 1 and not tone
    word = rng.choice(PLACES) if needs_word or rng.random() < SHARES["word"] else ""
    return Task(task_format, groups=groups, tone=tone, word=word, wording=wording)


def _sample_question(tone: str, wording: int, rng: random.Random) -> Task:
    noun = rng.choice(QUESTION_NOUNS)
    category = CATEGORY_OF[noun]
    if rng.random() < 0.5:
        category = rng.choice([other for other in CATEGORIES if other != category])
    return Task("answer", tone=tone, noun=noun, category=category, wording=wording)


def _sample_groups(size: int, rng: random.Random) -> tuple[tuple[str, int], ...]:
    """One to three items of one category, or one of each of two categories."""
    categories = rng.sample(tuple(CATEGORIES), size)
    counts = WORLD["single_counts"] if size == 1 else (1,)
    return tuple((category, rng.choice(counts)) for category in categories)
