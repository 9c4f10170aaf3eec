"""Prompts that a record holds twice, as many published files do: in `prompt` and in its replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from datasets import IterableDataset

from trl_instruct.console import get_logger
from trl_instruct.data.sources import AnyDataset, Record, Source, iterate, map_records

logger = get_logger(__name__)


def take_off_prompts(dataset: AnyDataset, where: Source, fields: tuple[str, ...]) -> AnyDataset:
    """The records, each reply without the prompt that it begins with; a warning says so.

    Messages that begin with the prompt's messages repeat them, whatever the other rows do. Text
    repeats the prompt only if all replies of all rows begin with it: "Hi" may be answered "Hi!".

    Args:
        dataset: rows with `prompt` and the replies in `fields`; a faulty row stays as it is.
        fields: `("chosen", "rejected")`, `("completion",)` or `("responses",)`, a list of replies.
    """
    first = 100 if isinstance(dataset, IterableDataset) else None  # rows that decide; None: all
    if not _repeat(islice(iterate(dataset), first), fields):
        return dataset
    names = "` and `".join(fields)
    logger.warning("%s: `%s` begin with the prompt, which is taken off", where.name, names)
    return map_records(dataset, partial(_without, fields=fields), features=dataset.features)


def prompt_in_dialogue(record: Record, field: str) -> bool:
    """Whether the text `prompt` is also a message of the conversation in `field`.

    >>> dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> prompt_in_dialogue({"prompt": "Hi", "chosen": dialogue}, "chosen")
    True
    """
    prompt, dialogue = record.get("prompt"), record.get(field)
    if not isinstance(prompt, str) or not isinstance(dialogue, list):
        return False
    contents = [m.get("content") for m in dialogue[:-1] if isinstance(m, Mapping)]
    return prompt.strip() in [text.strip() for text in contents if isinstance(text, str)]


def keep_dialogue(
    dataset: AnyDataset, where: Source, first: dict[str, Any], field: str
) -> tuple[AnyDataset, dict[str, Any]]:
    """The records, and the first, without the text `prompt` if `field` holds it too."""
    if not prompt_in_dialogue(first, field):
        return dataset, first
    logger.warning("%s: `prompt` repeats a message of `%s`; `%s` is read", where.name, field, field)
    rest = {name: value for name, value in first.items() if name != "prompt"}
    return dataset.remove_columns("prompt"), rest


def _repeat(rows: Iterable[Record], fields: tuple[str, ...]) -> bool:
    """Whether replies repeat the prompt: in any row of messages, in all rows of text."""
    text = False
    for record in rows:
        prompt = record.get("prompt")
        repeated = [_begins(r, prompt) for field in fields for r in _replies(record, field)]
        text = not isinstance(prompt, list)
        if any(repeated) and not text:
            return True
        if text and not all(repeated):
            return False
    return text


def _replies(record: Record, field: str) -> list[Any]:
    value = record.get(field)
    return value if field == "responses" and isinstance(value, list) else [value]


def _begins(reply: Any, prompt: Any) -> bool:
    """Whether a reply begins with the prompt and goes on after it."""
    if isinstance(prompt, str):
        return isinstance(reply, str) and reply.startswith(prompt) and len(reply) > len(prompt)
    if not isinstance(prompt, list) or not isinstance(reply, list):
        return False
    return 0 < len(prompt) < len(reply) and reply[: len(prompt)] == prompt


def _without(record: Record, fields: tuple[str, ...]) -> dict[str, Any]:
    prompt, changed = record["prompt"], {}
    for field in fields:
        cut = [r[len(prompt) :] if _begins(r, prompt) else r for r in _replies(record, field)]
        changed[field] = cut if field == "responses" and isinstance(record[field], list) else cut[0]
    return changed
