"""Dialogues: messages in our form, the reply at their end, the beginning that two of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_instruct.data.sources import Record
from trl_instruct.errors import InputError, kind_of

TURN = "\n\nAssistant:"
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"},
    # As LLaMA-Factory and open-instruct read them.
    **{"function_call": "assistant", "observation": "tool", "bing": "system"},
}


def messages_of(field: str, turns: Any) -> list[dict[str, str]]:
    """Messages with `role` and `content` from turns of either habit, `from` and `value` too.

    Contents of several text parts are joined.

    Raises:
        InputError: no list of turns; a role that nobody uses; a part that is no text.

    >>> messages_of("conversations", [{"from": "human", "value": "Bye"}])
    [{'role': 'user', 'content': 'Bye'}]
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"`{field}` is {kind_of(turns)}; a list of messages is needed.")
    return [_message(f"{field}[{index}]", turn) for index, turn in enumerate(turns)]


def _message(field: str, turn: Mapping[str, Any]) -> dict[str, str]:
    role = turn.get("role") or turn.get("from")
    if role not in ROLES:
        raise InputError(f"`{field}` has the role {role!r}; one of {', '.join(ROLES)} is known.")
    content = turn.get("content") if turn.get("role") else turn.get("value")
    if isinstance(content, list):
        if any(not isinstance(part, Mapping) or part.get("text") is None for part in content):
            raise InputError(f"`{field}` has a part that is no text, {kind_of(content)}.")
        content = "".join(part["text"] for part in content)
    return {"role": ROLES[role], "content": content or ""}


def said(text: Any) -> Any:
    """A reply as messages; None stays None."""
    return text if text is None else [{"role": "assistant", "content": text}]


def trim_dialogue(record: Record) -> dict[str, Any]:
    """`messages` from the first question to the last reply, contents in one part."""
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return {"messages": messages}
    if any(isinstance(message.get("content"), list) for message in messages):
        messages = messages_of("messages", messages)
    roles = [message.get("role") for message in messages]
    if "user" not in roles or "assistant" not in roles:
        return {"messages": messages}
    parts = split_reply(messages)
    return {"messages": [*parts["prompt"], *parts.get("completion", ())]}


def split_reply(messages: list[Any]) -> dict[str, Any]:
    """`prompt` and `completion`: the last reply, and all before it.

    A reply that nobody asked for at the beginning, and turns after the last reply, are left out:
    `cut` says so. `asked` is what a policy would continue, if the user has the last word. A
    dialogue without a reply is a prompt.

    >>> split_reply([{"role": "user", "content": "Hi"}])["asked"]
    [{'role': 'user', 'content': 'Hi'}]
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
    """Move what `chosen` and `rejected` both begin with into `prompt`.

    >>> extract_prompt({"chosen": "2+2= 4", "rejected": "2+2= 5"})
    {'prompt': '2+2=', 'chosen': ' 4', 'rejected': ' 5'}
    """
    chosen, rejected = record["chosen"], record["rejected"]
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, list):
        end = min(end, shorter - 1)
    elif TURN in chosen[:end]:
        end = chosen.rindex(TURN, 0, end) + len(TURN)
    else:
        while end and any(_is_word(text[end - 1 : end + 1]) for text in (chosen, rejected)):
            end -= 1  # not inside a word that both replies begin with
        end -= end > 0 and chosen[end - 1] == " "
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _is_word(letters: str) -> bool:
    return len(letters) == 2 and letters.isascii() and letters.isalpha()
