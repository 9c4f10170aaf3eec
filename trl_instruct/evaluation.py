"""Measure policies side by side: sampled and scored completions, means with intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trl_instruct.models import evaluating
from trl_instruct.reward_function import RewardFunction, as_completions, call_reward
from trl_instruct.rollouts import completion_logprobs
from trl_instruct.sampling import decode, eos_token_ids, generate, pad_prompts, prompt_tokens

Z_95 = 1.96


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent measurements with the normal 95 % interval, mean +- 1.96 sd / sqrt(n).

    >>> [round(number, 2) for number in mean_interval([0.0, 1.0])]
    [0.5, -0.48, 1.48]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = Z_95 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def grouped_interval(values: Tensor, groups: Tensor, weights: Tensor | None) -> Interval:
    """Weighted mean with its 95 % interval, of measurements that hang together in groups.

    The pairs of one prompt share their responses, so a prompt is one measurement, weighted by its
    pairs: the linearised variance of a ratio estimator. With one value a group this is
    `mean_interval`.

    Args:
        values: `(N,)`.
        groups: `(N,)` the number of each value's group, from 0.
        weights: `(N,)`; None: all 1.
    """
    values = values.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    total = weights.sum()
    mean = (values * weights).sum() / total
    there = groups.unique()
    if len(there) < 2:
        return Interval(mean.item(), math.nan, math.nan)
    deviations = torch.bincount(groups, weights=weights * (values - mean))
    sample = len(there) / (len(there) - 1)
    half = Z_95 * (sample * deviations.square().sum()).sqrt().item() / total.item()
    return Interval(mean.item(), mean.item() - half, mean.item() + half)


class Samples(NamedTuple):
    """What a policy says to B prompts: texts, and per completion its scores and measures."""

    completions: list[str]
    scores: dict[str, list[float]]
    kl: list[float]
    lengths: list[int]
    ended: list[bool]


@torch.no_grad()
def sample_and_score(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    rewards: dict[str, RewardFunction],
    *,
    ref_policy: PreTrainedModel | None,
    response_length: int,
    max_prompt_length: int | None = None,
    stop_strings: Sequence[str] | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Samples:
    """One sampled completion per prompt, judged by every reward.

    Args:
        policy: the model to measure.
        tokenizer: its tokenizer.
        prompts: column `prompt`; further columns reach the rewards.
        rewards: named reward functions.
        ref_policy: what the KL is measured to; None: KL 0.
        max_prompt_length: longer prompts lose their beginning, as in `ppo`.
        response_length, stop_strings, temperature, batch_size: of sampling.
        seed: of sampling.

    Raises:
        InputError: a prompt that is empty or does not fit into the context.
    """
    set_seed(seed)
    token_lists, _ = prompt_tokens(
        prompts["prompt"][:],
        tokenizer,
        policy,
        max_prompt_length=max_prompt_length,
        response_length=response_length,
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
    )
    texts = decode(completions, lengths, ended, tokenizer, stop_strings)
    columns = prompts[:]
    asked = columns.pop("prompt")
    given = as_completions(asked, texts)
    scores = {name: call_reward(f, asked, given, columns) for name, f in rewards.items()}
    kl = torch.zeros(len(texts))
    if ref_policy is not None:
        tokens = (*pad_prompts(token_lists, completions.device), completions, lengths)
        both = [
            _sequence_logprobs(m, tokens, temperature, batch_size) for m in (policy, ref_policy)
        ]
        kl = both[0] - both[1]
    return Samples(texts, scores, kl.tolist(), lengths.tolist(), ended.tolist())


def _sequence_logprobs(
    model: PreTrainedModel, tokens: tuple[Tensor, ...], temperature: float, batch_size: int
) -> Tensor:
    parts = zip(*(field.split(batch_size) for field in tokens), strict=True)
    with evaluating(model):
        logprobs = [completion_logprobs(model, *part, temperature=temperature) for part in parts]
    return torch.cat(logprobs).sum(dim=1).cpu()


def summarize(samples: Samples) -> dict[str, Any]:
    """Means of the samples: every score with its interval, KL, length, share ended."""
    scores = {name: mean_interval(s)._asdict() for name, s in samples.scores.items()}
    return {
        **scores,
        "kl": statistics.fmean(samples.kl),
        "length": statistics.fmean(samples.lengths),
        "ended": statistics.fmean(samples.ended),
    }
