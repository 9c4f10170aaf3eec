"""Dialogues: messages in our form, the reply at their end, the beginning that two of them share;
prompts that a record holds twice, as many published files do: in `prompt` and in its replies.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from datasets import IterableDataset

from trl_instruct.console import get_logger
from trl_instruct.data.sources import NAMES, AnyDataset, Record, Source, iterate, map_records
from trl_instruct.errors import InputError, kind_of

logger = get_logger(__name__)

TURN = "\n\nAssistant:"
IN_WORD = re.compile("[A-Za-z]{2}")
ROLES: dict[str, str] = NAMES["roles"]


def messages_of(field: str, turns: Any) -> list[dict[str, str]]:
    """Messages with `role` and `content` from turns of either habit, `from` and `value` too.

    Contents of several text parts are joined. InputError without a list of turns, for a role that
    nobody uses, or a part that is no text.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"`{field}` is {kind_of(turns)}; a list of messages is needed.")
    return [_message(f"{field}[{index}]", turn) for index, turn in enumerate(turns)]


def _message(field: str, turn: Mapping[str, Any]) -> dict[str, str]:
    role = turn.get("role") or turn.get("from")
    if role not in ROLES:
        raise InputError(f"`{field}` has the role {role!r}; one of {', '.join(ROLES)} is known.")
    if turn.get("tool_calls"):
        raise InputError(f"`{field}` calls a tool; only `messages` of plain text may hold calls.")
    content = turn.get("content") if turn.get("role") else turn.get("value")
    if isinstance(content, list):
        if any(not isinstance(part, Mapping) or part.get("text") is None for part in content):
            raise InputError(f"`{field}` has a part that is no text, {kind_of(content)}.")
        content = "".join(part["text"] for part in content)
    return {"role": ROLES[role], "content": content or ""}


def said(text: Any) -> Any:
    """A reply as messages; None stays None."""
    return text if text is None else [{"role": "assistant", "content": text}]


def trim_dialogue(messages: Any) -> Any:
    """Messages from the first question to the last reply, contents in one part."""
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return messages
    if any(isinstance(message.get("content"), list) for message in messages):
        messages = messages_of("messages", messages)
    roles = [message.get("role") for message in messages]
    if "user" not in roles or "assistant" not in roles:
        return messages
    parts = split_reply(messages)
    return [*parts["prompt"], *parts.get("completion", ())]


def split_reply(messages: list[Any]) -> dict[str, Any]:
    """`prompt` and `completion`: the last reply, and all before it.

    A reply that nobody asked for at the beginning, and turns after the last reply, are left out:
    `cut` says so. `asked` is what a policy would continue, if the user has the last word. A
    dialogue without a reply is a prompt.
    """
    asked = next((i for i, m in enumerate(messages) if m.get("role") == "user"), len(messages))
    kept = [m for i, m in enumerate(messages) if i >= asked or m.get("role") != "assistant"]
    last = max((i for i, m in enumerate(kept) if m.get("role") == "assistant"), default=None)
    ends = {"asked": kept} if kept and kept[-1].get("role") == "user" else {}
    if last is None:
        return {"prompt": kept, **ends}
    cut = {"cut": True} if last + 1 < len(messages) else {}
    return {"prompt": kept[:last], "completion": kept[last : last + 1], **ends, **cut}


def extract_prompt(record: Record) -> dict[str, Any]:
    """Move what `chosen` and `rejected` both begin with into `prompt`."""
    chosen, rejected = record["chosen"], record["rejected"]
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, list):
        end = min(end, shorter - 1)
    elif TURN in chosen[:end]:
        end = chosen.rindex(TURN, 0, end) + len(TURN)
    else:
        while end and any(IN_WORD.match(text, end - 1) for text in (chosen, rejected)):
            end -= 1  # not inside a word that both replies begin with
        end -= end > 0 and chosen[end - 1] == " "
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def take_off_prompts(dataset: AnyDataset, where: Source, fields: tuple[str, ...]) -> AnyDataset:
    """The records, each reply in `fields` without the prompt that it repeats; a warning says so.

    Messages that begin with the prompt's messages repeat them, whatever the other rows do. Text
    repeats the prompt only if all replies of all rows begin with it: "Hi" may be answered "Hi!".
    """
    first = 100 if isinstance(dataset, IterableDataset) else None  # rows that decide; None: all
    if not _repeat(islice(iterate(dataset), first), fields):
        return dataset
    names = "` and `".join(fields)
    logger.warning("%s: `%s` begin with the prompt, which is taken off", where.name, names)
    return map_records(dataset, partial(_without, fields=fields), features=dataset.features)


def prompt_in_dialogue(record: Record, field: str) -> bool:
    """Whether the text `prompt` is also a message of the conversation in `field`."""
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
    """Whether replies repeat the prompt: any of messages; all of text but those equal to it."""
    seen = False
    for record in rows:
        prompt = record.get("prompt")
        repeated = [_begins(r, prompt) for f in fields for r in _replies(record, f) if r != prompt]
        text = not isinstance(prompt, list)
        if any(repeated) and not text:
            return True
        if text and not all(repeated):
            return False
        seen |= any(repeated)
    return seen


def _replies(record: Record, field: str) -> list[Any]:
    value = record.get(field)
    return value if field == "responses" and isinstance(value, list) else [value]


def _begins(reply: Any, prompt: Any) -> bool:
    """Whether a reply begins with the prompt."""
    if not isinstance(prompt, str | list) or not isinstance(reply, type(prompt)):
        return False
    return 0 < len(prompt) <= len(reply) and reply[: len(prompt)] == prompt


def _without(record: Record, fields: tuple[str, ...]) -> dict[str, Any]:
    prompt, changed = record["prompt"], {}
    for field in fields:
        cut = [r[len(prompt) :] if _begins(r, prompt) else r for r in _replies(record, field)]
        changed[field] = cut if field == "responses" and isinstance(record[field], list) else cut[0]
    return changed
