"""Load demonstrations, prompts and plain texts; validate these and pairs.

An `InputError` names the source, the line (or row) and the field at fault.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

from datasets import IterableDataset

from trl_instruct.data.repeated_prompts import (
    keep_dialogue,
    prompt_in_dialogue,
    take_off_prompts,
)
from trl_instruct.data.sources import (
    AnyDataset,
    Record,
    Source,
    first_record,
    iterate,
    kind_of,
    load_records,
    map_records,
)
from trl_instruct.errors import InputError

logger = logging.getLogger(__name__)

ALIASES = {
    "prompt": ("instruction", "question", "input", "query", "prompts"),
    "completion": ("output", "answer", "response", "completions"),
    "responses": ("completions", "candidates", "outputs", "answers", "response"),
    "chosen": ("preferred", "winner", "accepted", "better"),
    "rejected": ("dispreferred", "loser", "worse"),
    "text": ("content", "document", "review", "texts"),
}
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
TURN = "\n\nAssistant:"


def load_demonstrations(source: Any, split: str = "train", streaming: bool = False) -> AnyDataset:
    """Demonstrations for SFT: `prompt` and `completion`, both text or both messages.

    TRL's `messages` column is split into `prompt` (all but the last message) and `completion` (the
    last, by the assistant); a text `prompt` that is one of the messages is left out. A prompt that
    the completions repeat is taken off. Other columns are kept. Arguments as `load_records`. The
    data of step 1 in InstructGPT, section 3.2.

    Raises:
        InputError: a column is missing; a field is null, empty, malformed or of another type; text
            and messages are mixed. When streaming: on reading the faulty record.

    >>> from datasets import Dataset
    >>> load_demonstrations(Dataset.from_list([{"prompt": "2+2=", "completion": "4"}]))[0]
    {'prompt': '2+2=', 'completion': '4'}
    """
    dataset, where = load_records(source, split, streaming), Source.of(source, split)
    first = first_record(dataset, where)
    columns = dataset.column_names or list(first)
    if "completion" not in columns and prompt_in_dialogue(first, "messages"):
        dataset = keep_dialogue(dataset, where, "messages")
        columns = [name for name in columns if name != "prompt"]
    if "messages" in columns and "prompt" not in columns:
        dataset = check_records(dataset, where, check_dialogue)
        types = dataset.features
        if types is not None:
            kept = {name: kind for name, kind in types.items() if name != "messages"}
            dialogue = types["messages"]
            types = type(types)({**kept, "prompt": dialogue, "completion": dialogue})
        return map_records(dataset, split_dialogue, remove_columns=["messages"], features=types)
    require_columns(columns, where, ("prompt", "completion"), "A demonstration", "or `messages`")
    dataset = take_off_prompts(dataset, where, ("completion",))
    return check_records(dataset, where, partial(check_demonstration, form=form_of(first)))


def load_prompts(source: Any, split: str = "train", streaming: bool = False) -> AnyDataset:
    """Prompts for PPO: `prompt`, text or messages. Other columns reach the reward functions.

    Arguments and errors as `load_demonstrations`; also a column named like an argument of rewards.

    >>> from datasets import Dataset
    >>> load_prompts(Dataset.from_list([{"prompt": "Name a city.", "country": "Italy"}]))[0]
    {'prompt': 'Name a city.', 'country': 'Italy'}
    """
    dataset, where = load_records(source, split, streaming), Source.of(source, split)
    first = first_record(dataset, where)
    columns = dataset.column_names or list(first)
    require_columns(columns, where, ("prompt",), "A prompt record")
    if taken := [name for name in REWARD_ARGUMENTS if name in columns]:
        raise InputError(
            f"{where.name}: a column is called `{taken[0]}`, the name of an argument that every "
            "reward is given. Rename it, or remove it."
        )
    return check_records(dataset, where, partial(check_prompt, form=form_of(first)))


def load_texts(source: Any, split: str = "train", streaming: bool = False) -> AnyDataset:
    """Plain texts for pre-training and the ptx loss: a `text` column. Arguments as `load_records`.

    Rows of white space (paragraph breaks of some corpora) are left out; their number is logged.

    Raises:
        InputError: `text` is missing, null or not text; no row has any text.

    >>> from datasets import Dataset
    >>> load_texts(Dataset.from_list([{"text": "Once upon a time."}, {"text": ""}])).num_rows
    1
    """
    dataset, where = load_records(source, split, streaming), Source.of(source, split)
    columns = dataset.column_names or list(first_record(dataset, where))
    require_columns(columns, where, ("text",), "A text record")
    dataset = check_records(dataset, where, _check_text_type)
    if isinstance(dataset, IterableDataset):
        logger.info("%s: streaming; rows without text are left out as they come", where.name)
        return dataset.filter(_has_text)
    rows = [row for row, text in enumerate(iterate(dataset, "text")) if text.strip()]
    if not rows:
        raise InputError(f"{where.name}: all {len(dataset)} rows have an empty `text`.")
    if len(rows) < len(dataset):
        dropped = len(dataset) - len(rows)
        logger.warning("%s: %d rows without text are left out", where.name, dropped)
        dataset = dataset.select(rows)
    return dataset


def openings(texts: AnyDataset, tokenizer: Any, length: int) -> AnyDataset:
    """Prompts for PPO from plain texts: the opening of each, as `prompt`; other columns are kept.

    The task of Ziegler et al. 2019, section 3.1: continue texts in a given style.

    Args:
        texts: column `text`, from `load_texts`.
        tokenizer: the policy's.
        length: tokens per opening; a shorter text is used whole.

    Raises:
        InputError: an opening is only white space.
    """

    def opening(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
        rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        cut = tokenizer.batch_decode(
            [row[:length] for row in rows], clean_up_tokenization_spaces=False
        )
        # A cut between two tokens of one character leaves half of it, which decodes to U+FFFD.
        return {"prompt": [text.rstrip("\ufffd") for text in cut]}

    return load_prompts(map_records(texts, opening, batched=True))


def form_of(record: Record) -> str:
    """`"messages"` if the record's prompt is a list, otherwise `"text"`."""
    return "messages" if isinstance(record.get("prompt"), list) else "text"


def check_prompt(record: Record, *, form: str) -> None:
    """Check the field `prompt`, text or messages; `form` is that of the first record.

    Raises:
        InputError: null, empty, malformed, or not of the form.

    >>> check_prompt({"prompt": "Name a city."}, form="text")
    """
    prompt = record.get("prompt")
    check_content("prompt", prompt)
    if form_of(record) != form:
        raise InputError(
            f"`prompt` is {form_of(record)}, but {form} in the first record; both need one format."
        )


def check_demonstration(record: Record, *, form: str) -> None:
    """Check `prompt` and `completion`: both text, or both messages that end with the assistant's.

    Raises:
        InputError: null, empty, malformed, or of two formats.

    >>> check_demonstration({"prompt": "2+2=", "completion": "4"}, form="text")
    """
    check_prompt(record, form=form)
    check_reply("completion", record.get("completion"), form=form)


def check_dialogue(record: Record) -> None:
    """Check the field `messages`: at least two, the last one the assistant's.

    >>> check_dialogue({"messages": [{"role": "user", "content": "Hi"}]})
    Traceback (most recent call last):
    ...
    trl_instruct.errors.InputError: `messages` has 1 message; at least a prompt and a reply are needed.
    """  # noqa: E501
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"`messages` is {kind_of(messages)}; a list of messages is needed.")
    if len(messages) < 2:
        count = f"{len(messages)} message{'' if len(messages) == 1 else 's'}"
        raise InputError(f"`messages` has {count}; at least a prompt and a reply are needed.")
    check_content("messages", messages[:-1])
    check_reply("messages", messages, form="messages")


def split_dialogue(record: Record) -> dict[str, Any]:
    """`messages` -> `prompt` (all but the last) and `completion` (the last).

    >>> split_dialogue({"messages": ["question", "answer"]})
    {'prompt': ['question'], 'completion': ['answer']}
    """
    return {"prompt": record["messages"][:-1], "completion": record["messages"][-1:]}


def check_reply(field: str, value: Any, *, form: str) -> None:
    """Check an assistant's reply: text to a text prompt, messages to a prompt of messages.

    Raises:
        InputError: null, empty, malformed, of the other format, or not ending with the assistant.

    >>> check_reply("completion", "", form="text")
    Traceback (most recent call last):
    ...
    trl_instruct.errors.InputError: `completion` is empty (''); write its text or delete the record.
    """
    check_content(field, value)
    found = "messages" if isinstance(value, list) else "text"
    if found != form:
        raise InputError(f"`{field}` is {found}, but `prompt` is {form}; both need one format.")
    if form == "messages" and value[-1]["role"] != "assistant":
        raise InputError(
            f"`{field}` ends with a message of role {value[-1]['role']!r}; it must be 'assistant'."
        )


def check_pair(record: Record, *, form: str, implicit: bool = False) -> None:
    """Check `prompt`, `chosen`, `rejected` and `margin`; `implicit`: the prompt is in the others.

    Raises:
        InputError: a faulty field, which is named.

    >>> check_pair({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, form="text")
    """
    if not implicit:
        check_prompt(record, form=form)
    for field in ("chosen", "rejected"):
        check_reply(field, record.get(field), form=form)
    if implicit and record["chosen"] != record["rejected"]:
        check_prompt(extract_prompt(record), form=form)
    margin = record.get("margin")
    number = isinstance(margin, Real) and not isinstance(margin, bool)
    if margin is not None and not (number and math.isfinite(margin)):
        raise InputError(f"`margin` is {kind_of(margin)}; a finite number is needed.")


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
    elif end and chosen[end - 1] == " ":
        end -= 1
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def check_content(field: str, value: Any) -> None:
    """Check that a field is text or well-formed messages, and not empty.

    Raises:
        InputError: null, another type, empty, or malformed messages.

    >>> check_content("prompt", [{"role": "user", "content": "Name a city."}])
    """
    if isinstance(value, list):
        _check_messages(field, value)
    elif not isinstance(value, str):
        raise InputError(f"`{field}` is {kind_of(value)}; text or a list of messages is needed.")
    elif not value.strip():
        raise InputError(f"`{field}` is empty ({value!r}); write its text or delete the record.")


def _check_messages(field: str, messages: Sequence[Any]) -> None:
    needed = 'a message is {"role": "user", "content": "..."}'
    if not messages:
        raise InputError(f"`{field}` is an empty list; write its messages or delete the record.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"`{field}[{index}]` is {kind_of(message)}; {needed}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"its keys are {', '.join(message)}" if key not in message else ""
                found = found or f"`{key}` is {kind_of(message[key])}"
                raise InputError(f"`{field}[{index}]` has no text `{key}` ({found}); {needed}.")
    if not messages[-1]["role"].strip() or not messages[-1]["content"].strip():
        raise InputError(f"`{field}[{len(messages) - 1}]` is empty: {messages[-1]}; {needed}.")


def _check_text_type(record: Record) -> None:
    if not isinstance(record.get("text"), str):
        raise InputError(f"`text` is {kind_of(record.get('text'))}; text is needed.")


def _has_text(record: Record) -> bool:
    return bool(record["text"].strip())


def check_records(
    dataset: AnyDataset, source: Source, check: Callable[[Record], None]
) -> AnyDataset:
    """The dataset, with `check` run on each record (of a stream: as it is read).

    `check` raises an `InputError`, to which this adds the file and line or row.
    """

    def checked(record: dict[str, Any], row: int) -> dict[str, Any]:
        with source.located(row):
            check(record)
        return record

    if isinstance(dataset, IterableDataset):
        return dataset.map(checked, with_indices=True, features=dataset.features)
    for row, record in enumerate(iterate(dataset, source=source)):
        checked(record, row)
    return dataset


def require_columns(
    found: Iterable[str], source: Source, needed: Sequence[str], what: str, otherwise: str = ""
) -> None:
    """Check that the columns which a kind of record needs are present.

    Raises:
        InputError: one is missing; lists the columns found and suggests what to rename.
    """
    found = list(found)
    missing = [column for column in needed if column not in found]
    if not missing:
        return
    raise InputError(
        f"{source.name}: {' and '.join(f'`{column}`' for column in missing)} missing. Columns "
        f"found: {', '.join(found)}. {what} needs {' and '.join(f'`{c}`' for c in needed)}"
        f"{' ' + otherwise if otherwise else ''}. {_advice(found, missing)}"
    )


def _advice(found: Sequence[str], missing: Sequence[str]) -> str:
    """What to do about missing columns. Several that may hold one field are to be joined."""
    for column in missing:
        known = (column, *ALIASES.get(column, ()))
        held = [name for name in found if name.strip().lower() in known]
        if len(held) > 1:
            return f"Join {' and '.join(f'`{name}`' for name in held)} into `{column}`."
        if held:
            rename = f'.rename_column("{held[0]}", "{column}")'
            return f"Rename the field in the file, or load it and {rename}."
    return "Add it."
