"""The one rendering: here a record becomes token ids, and sampled ids become text again.

What SFT trains on, what PPO continues, what a reward model reads and what a labeler sees are the
same ids and the same characters. A policy continues the ids of the prompt alone, so training keeps
these too: if a tokenizer would merge the prompt's last letters with the completion's first, the
completion is tokenised after the prompt's own tokens.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from trl.trainer.utils import remove_none_values

from trl_instruct.console import get_logger
from trl_instruct.data.sources import Record
from trl_instruct.errors import NOT_AS_EXPECTED, InputError, explained, located
from trl_instruct.types import Tokenizer

logger = get_logger(__name__)

# Columns of a record that its chat template reads, as in TRL.
ARGUMENTS = ("tools", "chat_template_kwargs")
# Texts before which a completion is tokenised, or after which it is decoded, as if inside a text.
ANCHORS = ("a", "\n", ".")


class Rendered(NamedTuple):
    """Ids of a prompt as a policy continues it, and of the completion, with what ends it.

    `closing` is the text that ends the completion: EOS, or the end of the template's turn. It is
    None if the template changes the completion's text (trims it, moves its thoughts).
    """

    prompt: list[int]
    completion: list[int]
    closing: str | None

    @property
    def ids(self) -> list[int]:
        """Prompt + completion."""
        return self.prompt + self.completion


def render(
    prompt: Any, completion: Any, tokenizer: Tokenizer, record: Record | None = None
) -> Rendered:
    """Prompt and completion as token ids. Arguments and errors as `render_all`."""
    (rendered,) = render_all(prompt, [completion], tokenizer, record)
    return rendered


def render_all(
    prompt: Any, completions: Sequence[Any], tokenizer: Tokenizer, record: Record | None = None
) -> list[Rendered]:
    """A prompt with each of its completions as token ids.

    Texts are joined and end with EOS, as TRL's trainers join them; messages go through the chat
    template, which reads the record's `tools` and `chat_template_kwargs`, if it has them.
    InputError for messages without a chat template, or that it refuses.
    """
    if isinstance(prompt, str):
        before, ids = _plain(prompt, tokenizer)
        opening, eos = prompt, str(tokenizer.eos_token)
        endings = ["" if text.endswith(eos) else eos for text in completions]
        rests = [text + end for text, end in zip(completions, endings, strict=True)]
        closings: list[str | None] = [*endings]
    else:
        arguments = template_arguments(record)
        answers = all(completion[0]["role"] == "assistant" for completion in completions)
        opening = _chat(prompt, tokenizer, arguments, opens=answers)
        before, ids = [], _ids(opening, tokenizer)
        rests, closings = [], []
        for completion in completions:
            whole = _chat([*prompt, *completion], tokenizer, arguments)
            said = str(completion[0].get("content") or "")
            rests.append(whole[_place(said, whole, opening) :])
            alone = len(completion) == 1 and rests[-1].startswith(said)
            closings.append(rests[-1][len(said) :] if alone else None)
    rendered = []
    for rest, closing in zip(rests, closings, strict=True):
        whole_ids = _ids(opening + rest, tokenizer)
        follows = whole_ids[: len(ids)] == ids
        after = whole_ids[len(ids) :] if follows else _after_anchor(rest, tokenizer)
        rendered.append(Rendered([*before, *ids], after, closing))
    return rendered


def render_prompt(prompt: Any, tokenizer: Tokenizer, record: Record | None = None) -> list[int]:
    """Ids of a prompt, a text or messages, as a policy continues it: without an EOS behind it."""
    if isinstance(prompt, str):
        before, ids = _plain(prompt, tokenizer)
        return before + ids
    return _ids(_chat(prompt, tokenizer, template_arguments(record), opens=True), tokenizer)


def render_prompts(
    prompts: Sequence[Any], tokenizer: Tokenizer, columns: Mapping[str, Sequence[Any]] | None = None
) -> list[list[int]]:
    """Ids of B prompts; `columns` may hold `ARGUMENTS`. An InputError has the prompt's number."""
    rows = []
    for row, prompt in enumerate(prompts):
        with located(f"Prompt {row + 1}"):
            rows.append(render_prompt(prompt, tokenizer, record_of(columns or {}, row)))
    ended = sum(ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1 for ids in rows)
    if ended:
        told = "%d prompts end with EOS in the chat template: it may lack add_generation_prompt"
        logger.warning(told, ended)
    return rows


def record_of(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """What one row of the columns gives its chat template."""
    return {name: columns[name][row] for name in ARGUMENTS if columns.get(name) is not None}


def template_arguments(record: Record | None) -> dict[str, Any]:
    """Keywords of the chat template: `tools`, and the entries of `chat_template_kwargs`.

    Tables give every struct the union of its keys: absent ones come back as null, and are left out.
    """
    given = [(record or {}).get(name) or None for name in ARGUMENTS]
    with explained("`tools` is a list, `chat_template_kwargs` an object, or JSON of them"):
        tools, others = (json.loads(v) if isinstance(v, str) else v for v in given)
        return remove_none_values({"tools": tools, **(others or {})})


def completion_texts(
    rows: Sequence[list[int]], tokenizer: Tokenizer, *, skip_special_tokens: bool = True
) -> list[str]:
    """Texts of sampled completions, with the space that some decoders strip (Llama 2, T5)."""
    anchor = _ids(ANCHORS[0], tokenizer)
    options = {"skip_special_tokens": skip_special_tokens}
    before, *texts = tokenizer.batch_decode([anchor, *(anchor + row for row in rows)], **options)
    return [
        text[len(before) :] if text.startswith(before) else tokenizer.decode(row, **options)
        for text, row in zip(texts, rows, strict=True)
    ]


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text, without what the tokenizer adds around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a prompt (BOS), and its ids; not what it appends.

    InputError if the prompt itself ends with EOS. (Alone, it is GPT-2's beginning of a text.)
    """
    ids = _ids(text, tokenizer)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise InputError(
            f"the prompt ends with the EOS token {tokenizer.eos_token!r}: a policy would go on "
            "after the end of a text. Remove it."
        )
    if not tokenizer.num_special_tokens_to_add():
        return [], ids
    full = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(ids) + 1):
        if full[start : start + len(ids)] == ids:
            return full[:start], ids
    return [], full


def _after_anchor(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that continues another one, whose tokens it does not join."""
    for anchor in ANCHORS:
        before, whole = _ids(anchor, tokenizer), _ids(anchor + text, tokenizer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return _ids(text, tokenizer)


def _chat(messages: Sequence[Any], tokenizer: Tokenizer, given: Any, opens: bool = False) -> str:
    """The messages in the chat template; InputError if there is none, or if it refuses them."""
    if tokenizer.chat_template is None:
        raise InputError(
            "The prompt is messages, but the tokenizer has no chat template. Set "
            "chat_template_path of sft or rm to a Jinja file or a model that has one, or give text."
        )
    clean = [_message(message) for message in messages]
    try:
        how: Any = {"tokenize": False, "add_generation_prompt": opens}
        return tokenizer.apply_chat_template(clean, **how, **given)
    except (TemplateError, *NOT_AS_EXPECTED) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InputError(
            f"The chat template refuses the messages with the roles {roles}: {error}. Change them "
            "(a system message may be put into the first user message), or give another "
            "chat_template_path."
        ) from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no nulls, and the arguments of a call as an object."""
    clean = {"content": "", **remove_none_values(message)}
    for call in clean.get("tool_calls") or ():
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(json.JSONDecodeError):
                function["arguments"] = json.loads(function["arguments"])
    return clean


def _place(said: str, whole: str, opening: str) -> int:
    """Where the reply begins in a rendered dialogue, mostly behind `opening`, at least its text."""
    if whole.startswith(opening) and whole != opening:
        return len(opening)
    # Some templates open a turn differently for a policy than in a dialogue.
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(opening, whole, strict=False))
    place = whole.find(said.strip(), len(list(alike)))
    if not said.strip() or place < 0:
        raise InputError(
            "The chat template renders a prompt differently with its reply than without, and the "
            f"reply's text is not in it, so it cannot be trained on: {whole[-80:]!r} after "
            f"{opening[-80:]!r}. Give another chat_template_path."
        )
    return place
