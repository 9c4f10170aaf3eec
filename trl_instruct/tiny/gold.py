"""The gold scorer: how well a completion does what its task asks, judged from the text alone."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from trl_instruct.tiny import world
from trl_instruct.tiny.world import Task, phrase, with_article

PENALTIES: dict[str, float] = world.WORLD["penalties"]


def _any_of(texts: list[str]) -> str:
    """A pattern of the texts, longest first so that no shorter one matches before it."""
    return "(?:" + "|".join(sorted(map(re.escape, texts), key=lambda t: (-len(t), t))) + ")"


_CATEGORY = {noun.lower(): category for noun, category in world.CATEGORY_OF.items()}
_TONE_OF = {text.lower(): tone for tone, texts in world.TONES.items() for text in texts}
_OPENING = re.compile(rf"(?<!\w){_any_of(list(_TONE_OF))}")
_WORD = re.compile(r"[^\W\d_]+")
_STRANGE = re.compile(r"[^a-z ,.!\n-]+")

_ITEM = _any_of([phrase(noun).lower() for noun in world.NOUNS])
_ITEMS = rf"{_ITEM}(?:(?:, {_ITEM})* and {_ITEM})?"
_PREPOSITION = _any_of(world.PREPOSITIONS)
_PLACE = rf"(?: {_PREPOSITION} the {_any_of(world.PLACES)})?"
_KIND = _any_of([with_article(category) for category in world.CATEGORIES])
_BODIES = {
    "list": re.compile(rf"(?: |^){_ITEMS}{_PLACE}\.?"),
    "dashes": re.compile(rf"(?:\n|^)- {_ITEM}(?:\n- {_ITEM})*{_PLACE}\.?"),
    "sentence": re.compile(rf"(?: |^){_ITEM} {_any_of(world.VERBS)} {_ITEMS}{_PLACE}\.?"),
    "answer": re.compile(rf"(?: |^)(?:yes|no), because ({_ITEM}) is ({_KIND})\.?"),
}
_GLUE = ("a", "an", "the", "and", "is")  # words that any reply may repeat
_WORLD = frozenset(
    {*_CATEGORY, *world.CATEGORIES, *world.PLACES, *world.PREPOSITIONS, *world.VERBS}
    | {*_GLUE, "yes", "no", "because"}
    | {word for opening in _TONE_OF for word in _WORD.findall(opening)}
)


def gold_score(
    prompts: list[str], completions: list[str], task: list[str], **columns: Any
) -> list[float]:
    """The gold score of each completion; a reward function for TRL's trainers.

    The share of its task's constraints that it meets, minus the penalties, in [0, 1]. Completions
    are texts without special tokens; the task of each, as json, says what is asked.
    """
    scores = []
    for completion, asked in zip(completions, task, strict=True):
        parts = explain(Task.from_json(asked), completion).values()
        met = [value for value in parts if isinstance(value, bool)]
        penalty = sum(value for value in parts if not isinstance(value, bool))
        scores.append(min(1.0, max(0.0, sum(met) / len(met) - penalty)))
    return scores


def explain(task: Task, completion: str) -> dict[str, bool | float]:
    """The parts of a gold score: a bool per constraint (met or not) and a float per penalty."""
    text = completion.strip().lower()
    openings = _OPENING.findall(text)
    start = _OPENING.match(text)
    body = text[start.end() :] if start else text
    words = _WORD.findall(_OPENING.sub(" ", text))
    check = _check_answer if task.format == "answer" else _check_items
    report: dict[str, bool | float] = {**check(task, body, words)}
    if task.tone:
        shown = [_TONE_OF[opening] for opening in openings]
        report["tone"] = start is not None and shown == [task.tone] and bool(words)
    # An item or an answer, not only an opening and a place.
    said = any(word in _CATEGORY or word in ("yes", "no") for word in words)
    counts = {
        "junk": len(_STRANGE.findall(text)) + sum(word not in _WORLD for word in words),
        "repetition": sum(n - 1 for word, n in Counter(words).items() if word not in _GLUE),
        "ending": not (text.endswith(".") and said),
        "superfluous": _superfluous(task, text, words, len(openings)),
    }
    return report | {name: PENALTIES[name] * count for name, count in counts.items()}


def reader_remark(task: Task, reply: str) -> str:
    """A reader's remark on a reply: all that is wrong with it, named as in :func:`explain`."""
    report = explain(task, reply).items()
    faults = [name for name, value in report if value is False or (value and value is not True)]
    return f"Wrong: {', '.join(faults)}." if faults else "Good."


def _check_items(task: Task, body: str, words: list[str]) -> dict[str, bool]:
    """A group is met by as many items of its category as asked, even if one comes twice."""
    named, different = _named(words), _named(set(words))
    report = {kind: different[kind] <= count <= named[kind] for kind, count in task.groups}
    if task.word:
        place = rf"\b{_PREPOSITION} the {task.word}\b"
        report["word"] = re.search(place, body) is not None
    report["format"] = _BODIES[task.format].fullmatch(body) is not None
    return report


def _named(words: Iterable[str]) -> Counter[str]:
    """How many of the words are items of each category."""
    return Counter(_CATEGORY[word] for word in words if word in _CATEGORY)


def _check_answer(task: Task, body: str, words: list[str]) -> dict[str, bool]:
    """The answer is one clear yes or no at the start; the reason says what the noun truly is."""
    answers = [word for word in words if word in ("yes", "no")]
    reply = _BODIES["answer"].fullmatch(body)
    truth = (phrase(task.noun).lower(), with_article(task.true_category))
    is_right = answers == [task.answer] == words[:1]
    return {"answer": is_right, "reason": reply is not None and reply.groups() == truth}


def _superfluous(task: Task, text: str, words: list[str], num_openings: int) -> int:
    """Number of openings, places, sentences, items of other categories and threes of extra words
    that nobody asked for. An item or a place that replaces a missing one is not counted."""
    openings = max(0, num_openings - bool(task.tone))
    named = _named(words)
    asked = dict(task.groups) or {task.true_category: 1}
    missing = sum(max(0, count - named[category]) for category, count in asked.items())
    foreign = {word for word in words if word in _CATEGORY and _CATEGORY[word] not in asked}
    items = max(0, len(foreign) - missing)
    replaced = bool(task.word) and task.word not in words
    places = max(0, sum(word in world.PLACES and word != task.word for word in words) - replaced)
    sentences = text.rstrip(".").count(".")
    too_long = max(0, len(words) - _most_words(task)) // 3
    return openings + items + places + sentences + too_long


def _most_words(task: Task) -> int:
    """The number of words in the longest good reply without its opening."""
    if task.format == "answer":
        return 7  # yes because a rose is a flower
    items = 2 * sum(count for _, count in task.groups)
    verb = task.format == "sentence"
    place = 3 * bool(task.word)  # near the river
    return items + verb + place + 1  # and
