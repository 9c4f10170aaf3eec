"""Reward adapters: whatever judges a completion, behind TRL's reward-function signature.

f(prompts, completions, **columns) -> list[float]: one score per completion; `columns` are the
prompt dataset's further columns. Prompts and completions are both texts or both lists of messages.
"""

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.masking import right_padded_mask
from trl_instruct.models import (
    ModelSource,
    accepted,
    check_tokenizer,
    context_length,
    is_nameless,
    load_reward_model,
    load_tokenizer,
)
from trl_instruct.scoring import pad_token_of, score_positions, scores_at
from trl_instruct.shift import keep_shift, shift_of
from trl_instruct.tiny import gold_score

RewardFunction = Callable[..., Sequence[float]]

TINY = "tiny"


class RewardModel:
    """A scalar sequence classifier as a reward function, with a tokenizer of its own.

    Prompt + completion is tokenised as TRL's RewardTrainer tokenised it in training: joined, EOS
    at the end for text, the chat template for messages. What exceeds the model's context is cut
    from the left, and counted in `truncated`. The shift in the model's config is taken off, so that
    demonstrations score 0 on average. Where the score is read: `scoring.py`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = check_tokenizer(tokenizer, model.config._name_or_path)
        self.batch_size = batch_size
        self.truncated = 0

    @property
    def __name__(self) -> str:
        return self.model.config._name_or_path or type(self.model).__name__

    @property
    def shift(self) -> float:
        """What is taken off the output of the model's head; 0 where none was measured."""
        return shift_of(self.model)

    def measure_shift(
        self, prompts: Sequence[Any], completions: Sequence[Any]
    ) -> tuple[float, float]:
        """Set the shift at which these demonstrations score 0 on average (InstructGPT 3.5).

        Returns:
            The mean and standard deviation of the model's own scores, without any shift.
        """
        scores = [score + self.shift for score in self(prompts, completions)]
        mean, std = statistics.fmean(scores), statistics.pstdev(scores)
        keep_shift(self.model, mean, std)
        return mean, std

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """Scores of the completions, one float each."""
        rows = [token_ids(p, c, self.tokenizer) for p, c in zip(prompts, completions, strict=True)]
        context = context_length(self.model)
        if context is not None:
            self.truncated += sum(len(row) > context for row in rows)
            rows = [row[-context:] for row in rows]
        by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            for row, score in zip(batch, self._score([rows[r] for r in batch]), strict=True):
                scores[row] = float(score) - self.shift
        return scores

    def _score(self, rows: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_rows(rows, self.tokenizer.pad_token_id).to(self.model.device)
        mask = right_padded_mask(lengths, ids.shape[1]).long().to(ids.device)
        columns = score_positions(ids, mask, pad_token_of(self.model))
        with scores_at(self.model, columns, ids.shape[1]):
            outputs = self.model(**accepted(self.model, input_ids=ids, attention_mask=mask))
        return outputs.logits.squeeze(-1)


def load_reward(
    reward: ModelSource | RewardFunction,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 64,
) -> RewardFunction:
    """A reward function from whatever `ppo` accepts as one.

    Args:
        reward: a function, `"tiny"` (the gold scorer), or a scalar reward model.
        tokenizer: for a model in memory that was not loaded from a folder with its own.
        batch_size: completions per forward pass of a model.
    """
    if isinstance(reward, str) and reward == TINY:
        return gold_score
    if reward is None:
        raise InputError(
            "No reward was given: set reward_model_path to a reward model's folder or Hub id, or "
            "pass a function f(prompts, completions, **columns) -> list[float]."
        )
    if callable(reward) and not isinstance(reward, nn.Module):
        return reward
    model = load_reward_model(reward, ModelConfig())
    if tokenizer is None or not is_nameless(reward):
        tokenizer = load_tokenizer(reward)
    return RewardModel(model, tokenizer, batch_size=batch_size)


def check_roles(
    model: nn.Module, ref_model: nn.Module | None, reward_model: Any, value_model: nn.Module
) -> None:
    """InputError where one object would be trained in one role and frozen in another."""
    if isinstance(reward_model, RewardModel):
        reward_model = reward_model.model
    roles = {"model": model, "ref_model": ref_model, "value_model": value_model}
    roles["reward_model"] = reward_model
    for (name, one), (other, two) in combinations(roles.items(), 2):
        if one is not None and one is two:
            raise InputError(
                f"{name} and {other} are the same object, and training one would change the other. "
                f"Load it twice, or pass copy.deepcopy({other}) as {other}."
            )


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


def pad_rows(rows: list[list[int]], filler: int) -> Tensor:
    """Rows of unequal length as one tensor, padded on the right.

    >>> pad_rows([[1, 2], [3]], 0).tolist()
    [[1, 2], [3, 0]]
    """
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler)


def call_reward(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Scores of a reward function, checked.

    Args:
        reward: any callable with the signature above; columns it has no parameter for are left
            out.
        prompts, completions: B texts, or B lists of messages.
        columns: further columns, B values each.

    Returns:
        B finite floats.

    Raises:
        InputError: parameters of other names, another number of scores than completions, or a
            score that is no finite number.
    """
    parameters = inspect.signature(reward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    name = reward_name(reward)
    if not takes_all and not {"prompts", "completions"} <= set(parameters):
        raise InputError(
            f"Reward {name!r} takes ({', '.join(parameters)}); it is called by name, so it needs "
            "the parameters (prompts, completions), and (..., **columns) for further columns."
        )
    wanted = {k: v for k, v in columns.items() if takes_all or k in parameters}
    scores = reward(prompts=prompts, completions=completions, **wanted)
    count = len(scores) if hasattr(scores, "__len__") else None
    if count != len(completions):
        given = f"{type(scores).__name__}" if count is None else f"{count} scores"
        raise InputError(
            f"Reward {name!r} returned {given} for {len(completions)} completions; it must "
            "return a list with one float per completion."
        )
    return [_finite(score, name, row) for row, score in enumerate(scores)]


def as_completions(prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
    """Completion texts in the prompts' own format: text, or the assistant's message."""
    if isinstance(prompts[0], str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def reward_name(reward: RewardFunction) -> str:
    """What to call a reward in messages and tables."""
    return getattr(reward, "__name__", type(reward).__name__)


def _finite(score: Any, name: str, row: int) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"Reward {name!r} gave completion {row + 1} the score {score!r}; a score must be a "
            "finite number."
        )
    return value
