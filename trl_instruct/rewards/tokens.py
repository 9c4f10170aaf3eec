"""The tokens that a reward model reads: those of the text, or those that the policy sampled."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from trl_instruct.data.rendering import completion_texts, record_of, render
from trl_instruct.types import Tokenizer


def reward_rows(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tokenizer: Tokenizer,
    completion_ids: Sequence[list[int]] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[list[int]]:
    """The tokens a reward model reads, one row per completion.

    They are the sampled tokens if those fit the text, otherwise the tokenised text. By the reward
    model's tokenizer, too, each completion was decoded from `completion_ids`, with or without those
    that ended it (None: only the texts are known).
    """
    sampled = _sampled(completions, completion_ids, tokenizer)
    rows = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        rendered = render(prompt, completion, tokenizer, record_of(columns or {}, row))
        own = sampled[row]
        if own is None or rendered.closing is None:
            rows.append(rendered.ids)
        else:
            closing = tokenizer(rendered.closing, add_special_tokens=False)["input_ids"]
            rows.append([*rendered.prompt, *own, *closing])
    return rows


def _sampled(
    completions: Sequence[Any], completion_ids: Sequence[list[int]] | None, tokenizer: Tokenizer
) -> Sequence[list[int] | None]:
    """The sampled tokens of each text, without what ended it.

    None where the text differs from them: special tokens in between, a stop string that was
    removed, a completion that is more than the assistant's message.
    """
    if completion_ids is None:
        return [None] * len(completions)
    cut = [ids[:-1] for ids in completion_ids]
    read = completion_texts([*completion_ids, *cut], tokenizer, skip_special_tokens=False)
    found: list[list[int] | None] = []
    for row, completion in enumerate(completions):
        text, count = _answer(completion), len(completions)
        whole = completion_ids[row] if text == read[row] else None
        found.append(cut[row] if whole is None and text == read[count + row] else whole)
    return found


def _answer(completion: Any) -> str | None:
    """The text of a completion that is a text or one assistant message, otherwise None."""
    if isinstance(completion, str):
        return completion
    roles = [message.get("role") for message in completion]
    return completion[0].get("content") if roles == ["assistant"] else None


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same tokens for all texts and messages."""
    if one is other:
        return True
    # A slow tokenizer, written in Python, has no rules to compare.
    fast = isinstance(one, PreTrainedTokenizerFast) and isinstance(other, PreTrainedTokenizerFast)
    return fast and _rules(one) == _rules(other)


def _rules(tokenizer: Any) -> tuple[Any, ...]:
    """The chat template, the special tokens that it may write (all but padding), and the rest."""
    tokens = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    of_the_last_call: Any = {"padding": None, "truncation": None}
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | of_the_last_call
    return tokenizer.chat_template, tokens, rules


def cut_prompt(rows: list[list[int]], prompt_ids: list[int], *, max_length: int) -> list[list[int]]:
    """The rows of one prompt's responses, with the prompt cut from the left until they fit.

    All lose the same tokens, so that the responses are judged after the same prompt. A response is
    never cut, and one token of the prompt stays: a row that does not fit even then is returned too
    long, and does not shorten the others. All rows begin with `prompt_ids`.
    """
    most = max(0, len(prompt_ids) - 1)
    longest = max((len(row) for row in rows if len(row) - most <= max_length), default=0)
    cut = max(0, longest - max_length)
    return [row[cut:] for row in rows]
