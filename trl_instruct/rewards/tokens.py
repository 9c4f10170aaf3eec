"""The tokens that a reward model reads: those of the text, or those that the policy sampled."""

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trl_instruct.models.tokenizers import tokenize_prompts


def reward_rows(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: Sequence[list[int]] | None = None,
) -> list[list[int]]:
    """The tokens a reward model reads, one row per completion.

    They are the sampled tokens if those fit the text, otherwise the tokenised text.

    Args:
        prompts, completions: texts, or lists of messages.
        tokenizer: the reward model's.
        completion_ids: the tokens that each completion was decoded from, by the same tokenizer,
            with or without those that ended it; None if only the texts are known.
    """
    known: Sequence[list[int] | None] = completion_ids or [None] * len(completions)
    return [
        _sampled_row(*row, tokenizer) or token_ids(*row[:2], tokenizer)
        for row in zip(prompts, completions, known, strict=True)
    ]


def _sampled_row(
    prompt: Any, completion: Any, ids: list[int] | None, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Prompt, sampled tokens, and what closes them; None if the text must be tokenised afresh.

    It must if the text differs from the tokens (special tokens in between, a stop string that was
    removed), or if `_closing` finds no end.
    """
    text = _answer(completion)
    if ids is None or text is None:
        return None
    own = next((part for part in (ids, ids[:-1]) if tokenizer.decode(part) == text), None)
    (opening,) = tokenize_prompts([prompt], tokenizer)
    closing = _closing(prompt, completion, text, opening, tokenizer)
    if own is None or closing is None:
        return None
    return [*opening, *own, *tokenizer(closing, add_special_tokens=False)["input_ids"]]


def _answer(completion: Any) -> str | None:
    """The text of a completion that is a text or one assistant message, otherwise None."""
    if isinstance(completion, str):
        return completion
    roles = [message.get("role") for message in completion]
    return completion[0].get("content") if roles == ["assistant"] else None


def _closing(
    prompt: Any,
    completion: Any,
    text: str,
    opening: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    """What a reward model reads after the completion: EOS, or the end of the template's turn.

    None if the model would read prompt or completion differently from the policy: the template adds
    or removes thoughts or trims the text, or EOS follows the prompt.
    """
    if isinstance(prompt, str):
        return None if opening[-1] == tokenizer.eos_token_id else tokenizer.eos_token
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    before += text
    return whole[len(before) :] if whole.startswith(before) else None


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same tokens for all texts and messages."""
    if one is other:
        return True
    # A slow tokenizer, written in Python, has no rules to compare.
    fast = isinstance(one, PreTrainedTokenizerFast) and isinstance(other, PreTrainedTokenizerFast)
    return fast and _shown(one) == _shown(other) and _rules(one) == _rules(other)


def _shown(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """The chat template, and the special tokens that it may write: all but padding."""
    tokens = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    return tokenizer.chat_template, tokens


def _rules(tokenizer: Any) -> str:
    """Vocabulary, merges and the rest, as a digest."""
    return _digest(tokenizer.backend_tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _digest(core: Tokenizer, size: int) -> str:
    """Digest of megabytes of JSON, so cached until tokens are added (`size`).

    Padding and truncation are left out: they are those of the last call.
    """
    rules = json.loads(core.to_str()) | {"padding": None, "truncation": None}
    return sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def token_ids(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Prompt + completion as a reward model reads them, in training and in use.

    Texts are joined and ended with EOS, as in TRL's RewardTrainer; messages use the chat template.
    """
    if isinstance(prompt, str):
        text = prompt + completion
        if not text.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]


def cut_prompt(
    rows: list[list[int]],
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> list[list[int]]:
    """The rows of one prompt's responses, with the prompt cut from the left until they fit.

    All lose the same tokens, as many as the longest needs, so that the responses are judged after
    the same prompt. A response is never cut, and one token of the prompt stays: a row that does not
    fit even then is returned too long, and does not shorten the others.

    Args:
        rows: prompt + response, from `token_ids`.
        max_length: most tokens of a row.
    """
    if isinstance(prompt, str):
        opening = tokenizer(prompt)["input_ids"]
    else:
        opening = tokenizer.apply_chat_template(prompt, return_dict=True)["input_ids"]
    # Only what all rows share: a token may join the prompt's last letters and a response's first.
    shared = takewhile(lambda tokens: len({*tokens}) == 1, zip(opening, *rows, strict=False))
    most = max(0, len(list(shared)) - 1)
    longest = max((len(row) for row in rows if len(row) - most <= max_length), default=0)
    cut = max(0, longest - max_length)
    return [row[cut:] for row in rows]
