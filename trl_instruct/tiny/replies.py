"""Replies of the tiny world: good ones, and flawed ones as on the web."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from trl_instruct.tiny import world
from trl_instruct.tiny.world import Task, join_and, phrase, with_article


@dataclass
class _Draft:
    """A reply before it is put into words."""

    format: str
    opening: str = ""
    items: Sequence[str] = ()
    word: str = ""
    answer: str = ""
    reason: tuple[str, str] = ("", "")


def good_reply(task: Task, rng: random.Random) -> str:
    """A reply that meets every constraint of the task and has nothing else."""
    return _render(_good_draft(task, rng), rng)


def flawed_reply(task: Task, rng: random.Random) -> str:
    """A reply that breaks each constraint at its rate of world.yaml."""
    draft = _good_draft(task, rng)
    spoil = _spoil_answer if task.format == "answer" else _spoil_items
    spoil(task, draft, rng)
    if _hit("tone", rng):
        others = [opening for openings in world.TONES.values() for opening in openings]
        draft.opening = rng.choice(others) if rng.random() < 0.5 else ""
    return _spoil_text(_render(draft, rng), rng)


def _good_draft(task: Task, rng: random.Random) -> _Draft:
    opening = rng.choice(world.TONES[task.tone]) if task.tone else ""
    if task.format == "answer":
        reason = (task.noun, task.true_category)
        return _Draft("answer", opening=opening, answer=task.answer, reason=reason)
    items: list[str] = []
    for category, count in task.groups:
        items += rng.sample(world.CATEGORIES[category], count)
    return _Draft(task.format, opening=opening, items=items, word=task.word)


def _render(draft: _Draft, rng: random.Random) -> str:
    if draft.format == "answer":
        noun, category = draft.reason
        because = f", because {phrase(noun)} is {with_article(category)}" if noun else ""
        body = draft.answer + because
    else:
        body = _items_text(draft.format, [phrase(noun) for noun in draft.items], rng)
        if draft.word:
            body += f" {rng.choice(world.PREPOSITIONS)} the {draft.word}"
    if not draft.opening.endswith(","):
        body = body[:1].upper() + body[1:]
    gap = "\n" if draft.format == "dashes" else " "
    return f"{draft.opening}{gap if draft.opening else ''}{body}."


def _items_text(reply_format: str, phrases: list[str], rng: random.Random) -> str:
    if reply_format == "dashes":
        return "\n".join(f"- {text}" for text in phrases)
    if reply_format == "sentence" and len(phrases) > 1:
        return f"{phrases[0]} {rng.choice(world.VERBS)} {join_and(phrases[1:])}"
    return join_and(phrases)


def _hit(flaw: str, rng: random.Random) -> bool:
    return rng.random() < world.WORLD["flaw_rates"][flaw]


def _spoil_items(task: Task, draft: _Draft, rng: random.Random) -> None:
    items = []
    for category, count in task.groups:
        wanted = count + rng.choice((-1, 1)) if _hit("count", rng) else count
        group = rng.sample(world.CATEGORIES[category], wanted)
        if group and _hit("category", rng):
            group[rng.randrange(len(group))] = rng.choice(world.NOUNS)
        items += group
    draft.items = items = items or [rng.choice(world.NOUNS)]
    if _hit("repeat", rng):
        items.insert(rng.randrange(len(items) + 1), rng.choice(items))
    if _hit("word" if draft.word else "place", rng):
        draft.word = "" if draft.word else rng.choice(world.PLACES)
    if _hit("format", rng):
        others = [f for f in ("list", "dashes", "sentence") if f != draft.format]
        draft.format = rng.choice(others)


def _spoil_answer(task: Task, draft: _Draft, rng: random.Random) -> None:
    if _hit("answer", rng):
        draft.answer = "no" if draft.answer == "yes" else "yes"
    if _hit("reason", rng):
        other = rng.choice(world.QUESTION_NOUNS)
        wrong_category = rng.choice([c for c in world.CATEGORIES if c != task.true_category])
        wrongs = ("", ""), (other, world.CATEGORY_OF[other]), (task.noun, wrong_category)
        draft.reason = rng.choice(wrongs)


def _spoil_text(text: str, rng: random.Random) -> str:
    if _hit("extra", rng):
        text += " " + rng.choice(world.CHATTER)
    if _hit("junk", rng):
        spaces = [i for i, letter in enumerate(text) if letter == " "] or [len(text)]
        place = rng.choice(spaces)
        text = f"{text[:place]} {rng.choice(world.JUNK)}{text[place:]}"
    if _hit("ending", rng):
        spaces = [i for i, letter in enumerate(text) if letter == " "]
        text = text[: rng.choice(spaces)] if spaces and rng.random() < 0.5 else text[:-1]
    return text
