"""Load demonstrations, prompts and plain texts; validate these and pairs.

An `InputError` names the source, the line (or row) and the field at fault.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from trl_instruct.console import get_logger, plural
from trl_instruct.data import dialogues, sources
from trl_instruct.data.conversion import REWARD_ARGUMENTS, mixed, read
from trl_instruct.data.orders import is_number
from trl_instruct.data.reading import AS_PUBLISHED, Reading, rename
from trl_instruct.data.rendering import render_prompt
from trl_instruct.data.sources import AnyDataset, Record, Source, first_record, iterate, map_records
from trl_instruct.errors import InputError, kind_of

logger = get_logger(__name__)

AS_TEXT = re.compile(r"\[\s*\{\s*.(role|content|from|value).\s*:")
MESSAGE = {"role": Value("string"), "content": Value("string")}


def load_demonstrations(
    source: Any, split: str = "train", streaming: bool = False, *, reading: Reading = AS_PUBLISHED
) -> AnyDataset:
    """Demonstrations for SFT: `prompt` and `completion`, both text or both messages.

    TRL's `messages` column is split into `prompt` (all before the last reply) and `completion` (the
    last reply, by the assistant); a text `prompt` that is one of the messages is left out. A prompt
    that the completions repeat is taken off. Other columns are kept. Published shapes are read as
    published (docs/bring_your_data.md). The data of step 1 in InstructGPT, section 3.2.

    Args:
        source, split, streaming: as `load_records`; a list of `DatasetConfig`: a mixture.
        reading: names of columns, the prompts' template, what to do with a faulty record.

    Raises:
        InputError: a column is missing; a field is null, empty, malformed or of another type; text
            and messages are mixed. When streaming: on reading the faulty record.

    >>> from datasets import Dataset
    >>> load_demonstrations(Dataset.from_list([{"prompt": "2+2=", "completion": "4"}]))[0]
    {'prompt': '2+2=', 'completion': '4'}
    """
    if isinstance(source, list):
        return mixed(partial(load_demonstrations, reading=reading), source, streaming)
    dataset, where, _ = read(source, split, streaming, "demonstration", reading)
    first = first_record(dataset, where)
    if "completion" not in first:
        dataset, first = dialogues.keep_dialogue(dataset, where, first, "messages")
    if "messages" in first and "prompt" not in first:
        return _in_two(dataset, where, first, reading)
    require_columns(first, where, ("prompt", "completion"), "A demonstration", "or `messages`")
    dataset, form = dialogues.take_off_prompts(dataset, where, ("completion",)), form_of(first)

    def check(record: Record) -> None:
        check_prompt(record, form=form)
        check_reply("completion", record.get("completion"), form=form)

    return reading.checked(dataset, check, where)


def _in_two(dataset: AnyDataset, where: Source, first: Record, reading: Reading) -> AnyDataset:
    """Dialogues as `prompt` and `completion`: trimmed, contents in one part."""
    in_parts = any(
        isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for message in first["messages"] or ()
    )
    dataset, types = reading.checked(dataset, check_dialogue, where), dataset.features
    if types is not None:
        dialogue = List(MESSAGE) if in_parts else types["messages"]
        types = Features({**types, "prompt": dialogue, "completion": dialogue})
        del types["messages"]
    if isinstance(dataset, Dataset) and not in_parts:
        talks = iterate(dataset, "messages")
        if cut := sum(dialogues.trim_dialogue(talk) != talk for talk in talks):
            what = "what stands before the first question or after the last reply"
            logger.warning("%s: %d dialogues lose %s", where.name, cut, what)

    def in_two(record: Record) -> dict[str, Any]:
        messages = dialogues.trim_dialogue(record["messages"])
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    return map_records(dataset, in_two, remove_columns=["messages"], features=types)


def load_prompts(
    source: Any, split: str = "train", streaming: bool = False, *, reading: Reading = AS_PUBLISHED
) -> AnyDataset:
    """Prompts for PPO: `prompt`, text or messages. Other columns reach the reward functions.

    Arguments and errors as `load_demonstrations`; also a column named like an argument of rewards.

    >>> from datasets import Dataset
    >>> load_prompts(Dataset.from_list([{"prompt": "Name a city.", "country": "Italy"}]))[0]
    {'prompt': 'Name a city.', 'country': 'Italy'}
    """
    if isinstance(source, list):
        return mixed(partial(load_prompts, reading=reading), source, streaming)
    dataset, where, _ = read(source, split, streaming, "prompt", reading)
    first = first_record(dataset, where)
    require_columns(first, where, ("prompt",), "A prompt record")
    if taken := [name for name in REWARD_ARGUMENTS if name in first]:
        raise InputError(
            f"{where.name}: a column is called `{taken[0]}`, the name of an argument that every "
            "reward is given. Rename it, or remove it."
        )
    return reading.checked(dataset, partial(check_prompt, form=form_of(first)), where)


def load_texts(
    source: Any, split: str = "train", streaming: bool = False, *, reading: Reading = AS_PUBLISHED
) -> AnyDataset:
    """Plain texts for pre-training and the ptx loss: a `text` column. Arguments as `load_records`.

    Rows of white space (paragraph breaks of some corpora) are left out; their number is logged.
    InputError if `text` is missing, null or not text, or no row has any text.
    """
    if isinstance(source, list):
        return mixed(partial(load_texts, reading=reading), source, streaming)
    where = Source.of(source, split)
    dataset = rename(sources.load_records(source, split, streaming), where, reading)
    require_columns(first_record(dataset, where), where, ("text",), "A text record")

    def check(record: Record) -> None:
        if not isinstance(record.get("text"), str):
            raise InputError(f"`text` is {kind_of(record.get('text'))}; text is needed.")

    dataset = reading.checked(dataset, check, where)
    where = (reading.found or [where])[-1]
    none = "all {} rows have an empty `text`."
    kept = reading.keep(dataset, lambda record, _: bool(record["text"].strip()), where, none)
    if isinstance(dataset, IterableDataset):
        logger.info("%s: streaming; rows without text are left out as they come", where.name)
    elif dropped := len(dataset) - len(kept):
        logger.warning("%s: %d rows without text are left out", where.name, dropped)
    return kept


def openings(texts: AnyDataset, tokenizer: Any, length: int) -> AnyDataset:
    """Prompts for PPO from plain texts: the opening of each, as `prompt`; other columns are kept.

    The task of Ziegler et al. 2019, section 3.1: continue texts (from `load_texts`) in a given
    style. An opening has `length` tokens of the policy's tokenizer; a shorter text is used whole.
    """

    def opening(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
        rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        starts = [row[:length] for row in rows]
        cut = tokenizer.batch_decode(starts, clean_up_tokenization_spaces=False)
        # A cut between two tokens of one character leaves half of it, which decodes to U+FFFD.
        return {"prompt": [text.rstrip("\ufffd") for text in cut]}

    return load_prompts(map_records(texts, opening, batched=True))


def prompts_of(
    source: Any, split: str, tokenizer: Any, opening_length: int | None, reading: Reading
) -> Dataset:
    """Prompts, or the openings of texts; none that the chat template refuses, if bad ones go."""
    if opening_length:
        return openings(load_texts(source, split, reading=reading), tokenizer, opening_length)
    prompts = load_prompts(source, split, reading=reading)
    if not reading.skips:
        return prompts
    return reading.checked(prompts, lambda row: render_prompt(row["prompt"], tokenizer, row))


def form_of(record: Record) -> str:
    """`"messages"` if the record's prompt is a list, otherwise `"text"`."""
    return "messages" if isinstance(record.get("prompt"), list) else "text"


def reply_type(features: Features, form: str) -> Any:
    """The column type of one of the `responses`: messages if the prompt is."""
    given = getattr(features["responses"], "feature", Value("string"))
    return List(MESSAGE) if form == "messages" and not isinstance(given, List) else given


def check_prompt(record: Record, *, form: str) -> None:
    """Check the field `prompt`: not null, empty or malformed, and of the first record's `form`."""
    check_content("prompt", record.get("prompt"))
    if form_of(record) != form:
        raise InputError(f"`prompt` is {form_of(record)}, but {form} in the first record; use one.")


def check_dialogue(record: Record) -> None:
    """Check the field `messages`, trimmed: at least two, the last one the assistant's."""
    messages = dialogues.trim_dialogue(record.get("messages"))
    if not isinstance(messages, list):
        raise InputError(f"`messages` is {kind_of(messages)}; a list of messages is needed.")
    if len(messages) < 2:
        count = plural(len(messages), "message")
        raise InputError(f"`messages` has {count}; at least a prompt and a reply are needed.")
    check_content("messages", messages[:-1])
    check_reply("messages", messages, form="messages")


def check_reply(field: str, value: Any, *, form: str) -> None:
    """Check a reply: text, or messages that end with the assistant's, as `form` is the prompt's."""
    check_content(field, value)
    found = "messages" if isinstance(value, list) else "text"
    if found != form:
        raise InputError(f"`{field}` is {found}, but `prompt` is {form}; both need one format.")
    if form == "messages" and value[-1]["role"] != "assistant":
        raise InputError(
            f"`{field}` ends with a message of role {value[-1]['role']!r}; it must be 'assistant'."
        )


def check_pair(record: Record, *, form: str, implicit: bool = False) -> None:
    """Check `prompt`, `chosen`, `rejected`, `margin`; `implicit`: the prompt is in the others."""
    if not implicit:
        check_prompt(record, form=form)
    for field in ("chosen", "rejected"):
        check_reply(field, record.get(field), form=form)
    if implicit and record["chosen"] != record["rejected"]:
        check_prompt(dialogues.extract_prompt(record), form=form)
    margin = record.get("margin")
    if margin is not None and not is_number(margin):
        raise InputError(f"`margin` is {kind_of(margin)}; a finite number is needed.")


def check_implicit(first: Record, where: Source) -> None:
    """InputError for pairs of text that have a prompt of another name than ours beside them."""
    names = (*sources.NAMES["aliases"]["prompt"].split(), *sources.NAMES["like_prompts"].split())
    if isinstance(first["chosen"], str) and {"prompt", *names} & {name.lower() for name in first}:
        require_columns(first, where, ("prompt",), "A pair")


def check_content(field: str, value: Any) -> None:
    """Check that a field is text or well-formed messages, and neither null nor empty."""
    if isinstance(value, list):
        _check_messages(field, value)
    elif not isinstance(value, str):
        raise InputError(f"`{field}` is {kind_of(value)}; text or a list of messages is needed.")
    elif AS_TEXT.match(value):
        raise InputError(f"`{field}` is messages as text, {kind_of(value)}; write the list itself.")
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
            called = key == "content" and message.get("tool_calls")
            if not isinstance(message.get(key), str) and not called:
                found = f"its keys are {', '.join(message)}" if key not in message else ""
                found = found or f"`{key}` is {kind_of(message[key])}"
                raise InputError(f"`{field}[{index}]` has no text `{key}` ({found}); {needed}.")
        known = dialogues.ROLES.get(message["role"].lower(), message["role"])
        if known != message["role"]:
            raise InputError(f"`{field}[{index}]` is of role {message['role']!r}; write {known!r}.")
    last = messages[-1]
    said = last.get("tool_calls") or (last["content"] or "").strip()
    if not last["role"].strip() or not said:
        raise InputError(f"`{field}[{len(messages) - 1}]` is empty: {messages[-1]}; {needed}.")


def require_columns(
    found: Collection[str], source: Source, needed: Sequence[str], what: str, otherwise: str = ""
) -> None:
    """InputError if a needed column is missing, with those found and what to rename."""
    missing = [column for column in needed if column not in found]
    if missing:
        raise InputError(
            f"{source.name}: {' and '.join(f'`{column}`' for column in missing)} missing. Columns "
            f"found: {', '.join(found)}. {what} needs {' and '.join(f'`{c}`' for c in needed)}"
            f"{' ' + otherwise if otherwise else ''}. {_advice(found, missing)}"
        )


def _advice(found: Collection[str], missing: Sequence[str]) -> str:
    """What to do about missing columns. Several that may hold one field are to be joined."""
    if "input_ids" in found:
        return f"input_ids are tokens; give the text in `{missing[0]}` (docs/names.md)."
    for column in missing:
        known = (column, *sources.NAMES["aliases"].get(column, "").split())
        held = [name for name in found if name.strip().lower() in known]
        if len(held) > 1:
            return f"Join {' and '.join(f'`{name}`' for name in held)} into `{column}`."
        if held:
            rename = f'.rename_column("{held[0]}", "{column}")'
            return f"Rename the field in the file, or load it and {rename}."
    return f"Add it. If another column holds it, say so: --columns {missing[0]}=COLUMN."
