"""The tokens that a reward model reads: of texts, and those that the policy sampled itself."""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trl_instruct.reward_function import as_completions
from trl_instruct.sampling import tokenize_prompts


class SampledText(str):
    """A completion as text that knows which tokens were sampled, and behind which prompt.

    To a reward it is a text like any other, in a list, behind an adapter or in a message; a copy
    that is sent elsewhere is plain text.

    Args:
        text: the completion.
        prompt: text or messages.
        token_ids: of the prompt and of the completion, without what ended it.
        tokenizer: the policy's.
    """

    prompt: Any
    token_ids: list[int]
    tokenizer: PreTrainedTokenizerBase

    def __new__(
        cls, text: str, prompt: Any, token_ids: list[int], tokenizer: PreTrainedTokenizerBase
    ) -> "SampledText":
        self = super().__new__(cls, text)
        self.prompt, self.token_ids, self.tokenizer = prompt, token_ids, tokenizer
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

    Args:
        texts, prompts: B each, `prompt_ids` the prompts' tokens, of which none is cut.
        completion_ids, lengths, ended: `(B, C)`, `(B,)`, `(B,)`, as in `Rollout`.
        tokenizer: what decoded them.
    """
    counts = (lengths - ended.long()).tolist()
    rows = zip(prompt_ids, completion_ids.tolist(), counts, strict=True)
    tokens = [[*prompt, *ids[:count]] for prompt, ids, count in rows]
    given = zip(texts, prompts, tokens, strict=True)
    return [SampledText(text, prompt, ids, tokenizer) for text, prompt, ids in given]


def reward_rows(
    prompts: Sequence[Any], completions: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens a reward model reads, a row for each completion.

    Those that were sampled, where they were sampled behind this prompt with the reward model's
    tokenizer and chat template; else those that its tokenizer makes of the text.

    Args:
        prompts, completions: texts, or lists of messages; completions of one policy.
        tokenizer: the reward model's.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    sampled = next((text for text in texts if isinstance(text, SampledText)), None)
    closing = None
    if sampled is not None and same_tokenizer(sampled.tokenizer, tokenizer):
        closing = closing_ids(tokenizer, messages=not isinstance(completions[0], str))
    rows = []
    for prompt, completion, text in zip(prompts, completions, texts, strict=True):
        if closing is not None and isinstance(text, SampledText) and text.prompt == prompt:
            rows.append([*text.token_ids, *closing])
        else:
            rows.append(token_ids(prompt, completion, tokenizer))
    return rows


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers make the same tokens of every text and of all messages."""
    if one is other:
        return True
    # One written in Python shows no rules to compare.
    fast = isinstance(one, PreTrainedTokenizerFast) and isinstance(other, PreTrainedTokenizerFast)
    own = (one.chat_template, one.eos_token) == (other.chat_template, other.eos_token)
    return fast and own and _same_rules(one.backend_tokenizer, other.backend_tokenizer)


@lru_cache(maxsize=8)
def _same_rules(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same vocabulary, merges, ...: megabytes of JSON, so once.

    Padding and truncation are left out: they are those of the last call.
    """
    rules = [json.loads(tokenizer.to_str()) | _OF_A_CALL for tokenizer in (one, other)]
    return rules[0] == rules[1]


_OF_A_CALL = {"padding": None, "truncation": None}


def closing_ids(tokenizer: PreTrainedTokenizerBase, *, messages: bool) -> list[int] | None:
    """What a reward model reads behind a completion: EOS, or the end of the template's turn.

    Returns:
        None where prompt and completion are not all there is before it: a template that puts
        something between them, or that writes a prompt otherwise once it is answered.
    """
    prompt: Any = [{"role": "user", "content": "a"}] if messages else "a\n"
    (opening,) = tokenize_prompts([prompt], tokenizer)
    answers = as_completions([prompt] * 2, ["b", "c"])
    one, two = (token_ids(prompt, answer, tokenizer) for answer in answers)
    alike = takewhile(lambda tokens: len({*tokens}) == 1, zip(one[::-1], two[::-1], strict=False))
    end = len(one) - len(list(alike))
    whole = one[: len(opening)] == opening
    whole = whole and tokenizer.decode(one[len(opening) : end]).strip() == "b"
    return one[end:] if whole else None


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
