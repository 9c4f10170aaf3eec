"""One completion per prompt: sampled, scored, and its log-probability."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trl_instruct.generation.logits import completion_logprobs
from trl_instruct.generation.sampling import (
    decode,
    eos_token_ids,
    generate,
    pad_prompts,
    prompt_tokens,
)
from trl_instruct.models.properties import evaluating
from trl_instruct.padding import similar_lengths, unpadded
from trl_instruct.rewards.function import RewardFunction, as_completions, call_reward


class Sampled(NamedTuple):
    """One completion for each of B prompts, as tokens and as text.

    prompt_ids `(B, P)`, prompt_lengths `(B,)`, completion_ids `(B, C)`, completion_lengths `(B,)`,
    ended `(B,)`: as in `Rollout`, on CPU.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_lengths: Tensor
    ended: Tensor
    texts: list[str]

    @property
    def ids(self) -> list[list[int]]:
        """Tokens of each completion, including those that ended it."""
        return unpadded(self.completion_ids, self.completion_lengths)


def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    response_length: int,
    max_prompt_length: int | None = None,
    stop_strings: Sequence[str] | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Sampled:
    """One sampled completion per prompt.

    Args:
        prompts: texts or lists of messages.
        max_prompt_length: longer prompts are cut from the left, as in `ppo`.
        response_length, stop_strings, temperature, batch_size, progress: as in `generate`.

    Raises:
        InputError: a prompt is empty or does not fit into the context.
    """
    set_seed(seed)
    token_lists, _ = prompt_tokens(
        prompts,
        tokenizer,
        policy,
        max_prompt_length=max_prompt_length,
        response_length=response_length,
        columns=columns,
    )
    completions, lengths, ended = generate(
        policy,
        token_lists,
        max_new_tokens=response_length,
        eos_token_ids=eos_token_ids(policy, tokenizer),
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        temperature=temperature,
        batch_size=batch_size,
        progress=progress,
    )
    texts = decode(completions, lengths, ended, tokenizer, stop_strings)
    prompt_ids, prompt_lengths = pad_prompts(token_lists, torch.device("cpu"))
    drawn = (completions.cpu(), lengths.cpu(), ended.cpu())
    return Sampled(prompt_ids, prompt_lengths, *drawn, texts)


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel, sampled: Sampled, *, temperature: float = 1.0, batch_size: int = 64
) -> Tensor:
    """Log-probability of each completion, `(B,)` nats, float32 on CPU.

    Args:
        model: any language model with the same vocabulary.
        temperature: the logits are divided by it.
        batch_size: most completions per forward pass.
    """
    fields = [field.to(model.device) for field in sampled[:4]]
    summed = torch.zeros(len(sampled.texts))
    lengths = sampled.prompt_lengths + sampled.completion_lengths
    with evaluating(model):
        for rows in similar_lengths(lengths.tolist(), batch_size):
            part = (field[rows] for field in fields)
            logprobs = completion_logprobs(model, *part, temperature=temperature)
            summed[rows] = logprobs.sum(dim=1).cpu()
    return summed


def score_completions(
    prompts: Dataset, texts: Sequence[str], ids: Sequence[list[int]], reward: RewardFunction
) -> list[float]:
    """Scores of one completion per prompt.

    Args:
        prompts: column `prompt`; further columns reach the reward.
        texts, ids: the completions and their tokens.
    """
    columns = prompts[:]
    asked = columns.pop("prompt")
    given = {**columns, "completion_ids": ids}
    return call_reward(reward, asked, as_completions(asked, texts), given)
