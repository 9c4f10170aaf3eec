"""The tokens that a reward model reads: of texts, and those that the policy sampled itself."""

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class SampledText(str):
    """A completion as text that knows which tokens were sampled, and behind which prompt.

    To a reward it is a text like any other, in a list, behind an adapter or in a message; a copy
    that is sent elsewhere is plain text.

    Args:
        text: the completion.
        prompt: text or messages.
        prompt_ids, completion_ids: their tokens, without what ended the completion.
        tokenizer: the policy's.
    """

    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    tokenizer: PreTrainedTokenizerBase

    def __new__(
        cls,
        text: str,
        prompt: Any,
        prompt_ids: list[int],
        completion_ids: list[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> "SampledText":
        self = super().__new__(cls, text)
        self.prompt, self.tokenizer = prompt, tokenizer
        self.prompt_ids, self.completion_ids = prompt_ids, completion_ids
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def sampled_texts(
    texts: Sequence[str],
    prompts: Sequence[Any],
    prompt_ids: Sequence[list[int]],
    completion_ids: Tensor,
    lengths: Tensor,
    ended: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """B completions as text, each with the tokens it was decoded from.

    One that holds special tokens, which its text does not show, is plain text: a reward model that
    read them would judge what nobody sees.

    Args:
        texts, prompts: B each, `prompt_ids` the prompts' tokens, of which none is cut.
        completion_ids, lengths, ended: `(B, C)`, `(B,)`, `(B,)`, as in `Rollout`.
        tokenizer: what decoded them.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    counts = (lengths - ended.long()).tolist()
    sampled: list[str] = []
    rows = zip(texts, prompts, prompt_ids, completion_ids.tolist(), counts, strict=True)
    for text, prompt, opening, ids, count in rows:
        own = ids[:count]
        plain = special.isdisjoint(own)
        sampled.append(SampledText(text, prompt, opening, own, tokenizer) if plain else text)
    return sampled


def reward_rows(
    prompts: Sequence[Any], completions: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens a reward model reads, a row for each completion.

    Those that were sampled, where they were sampled behind this prompt with the reward model's
    tokenizer and chat template, and are what it reads of the text; else those that its tokenizer
    makes of the text.

    Args:
        prompts, completions: texts, or lists of messages.
        tokenizer: the reward model's.
    """
    return [
        _sampled_row(prompt, completion, tokenizer) or token_ids(prompt, completion, tokenizer)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _sampled_row(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """The tokens that were sampled, closed as the text is; None where the text is to be read."""
    text = _answer(completion)
    if not isinstance(text, SampledText) or text.prompt != prompt:
        return None
    if not same_tokenizer(text.tokenizer, tokenizer):
        return None
    closing = _closing(prompt, completion, text, tokenizer)
    if closing is None:
        return None
    end = tokenizer(closing, add_special_tokens=False)["input_ids"]
    return [*text.prompt_ids, *text.completion_ids, *end]


def _answer(completion: Any) -> Any:
    """The text of a completion that is a text, or one message of the assistant's."""
    if isinstance(completion, list):
        roles = [message.get("role") for message in completion]
        return completion[0].get("content") if roles == ["assistant"] else None
    return completion


def _closing(
    prompt: Any, completion: Any, text: SampledText, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """What stands behind the completion where a reward model reads it: EOS, or the template's end.

    Returns:
        None where something else stands before it than the prompt and the completion, as they are:
        thoughts that a template puts in or leaves out, a text that it trims, an EOS behind the
        prompt.
    """
    if isinstance(prompt, str):
        return None if text.prompt_ids[-1] == tokenizer.eos_token_id else tokenizer.eos_token
    opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    before = opening + text
    return whole[len(before) :] if whole.startswith(before) else None


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers make the same tokens of every text and of all messages."""
    if one is other:
        return True
    # One written in Python shows no rules to compare.
    fast = isinstance(one, PreTrainedTokenizerFast) and isinstance(other, PreTrainedTokenizerFast)
    return fast and _shown(one) == _shown(other) and _rules(one) == _rules(other)


def _shown(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What a chat template may write: itself and the special tokens but padding."""
    tokens = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    return tokenizer.chat_template, tokens


def _rules(tokenizer: Any) -> str:
    """Vocabulary, merges and the rest, as a digest."""
    return _digest(tokenizer.backend_tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _digest(core: Tokenizer, size: int) -> str:
    """Of megabytes of JSON, so once, and again where tokens have been added (`size`).

    Padding and truncation are left out: they are those of the last call.
    """
    rules = json.loads(core.to_str()) | {"padding": None, "truncation": None}
    return sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def token_ids(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Prompt + completion as a reward model reads them, in training and in use.

    Args:
        prompt, completion: two texts (joined and ended with EOS, as TRL's RewardTrainer does), or
            two lists of messages (in the chat template).
        tokenizer: the reward model's.
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
    """The rows of one prompt's responses without so much of the prompt's beginning that they fit.

    All lose the same tokens, as many as the longest needs, so that the responses are still judged
    behind one and the same prompt. A response is never cut and one token of the prompt stays: a
    row that is too long even so comes back too long, and the others are not cut on its account.

    Args:
        rows: prompt + response, as `token_ids` gives them.
        prompt: text or messages.
        tokenizer: what made the rows.
        max_length: tokens that a row may have.
    """
    if isinstance(prompt, str):
        opening = tokenizer(prompt)["input_ids"]
    else:
        opening = tokenizer.apply_chat_template(prompt, return_dict=True)["input_ids"]
    # A token may join the prompt's last letters and the response's first: what all rows share.
    shared = takewhile(lambda tokens: len({*tokens}) == 1, zip(opening, *rows, strict=False))
    most = max(0, len(list(shared)) - 1)
    longest = max((len(row) for row in rows if len(row) - most <= max_length), default=0)
    cut = max(0, longest - max_length)
    return [row[cut:] for row in rows]
