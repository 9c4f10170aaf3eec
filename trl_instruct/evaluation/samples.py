"""What policies say to the same prompts: sampled, scored, measured against a reference."""

import statistics
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
from trl_instruct.intervals import mean_interval
from trl_instruct.models.properties import evaluating
from trl_instruct.padding import similar_lengths
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


class Samples(NamedTuple):
    """What a policy says to B prompts: texts, and per completion its scores and measures."""

    completions: list[str]
    scores: dict[str, list[float]]
    kl: list[float]
    lengths: list[int]
    ended: list[bool]


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
) -> Sampled:
    """One sampled completion per prompt.

    Args:
        policy: the model to sample from.
        tokenizer: its tokenizer.
        prompts: texts or lists of messages.
        max_prompt_length: longer prompts lose their beginning, as in `ppo`.
        response_length, stop_strings, temperature, batch_size, progress: of `generate`.
        seed: of sampling.

    Raises:
        InputError: a prompt that is empty or does not fit into the context.
    """
    set_seed(seed)
    token_lists, _ = prompt_tokens(
        prompts,
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
        model: any language model over the same tokens.
        sampled: B completions.
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


def judged(
    prompts: Dataset, texts: Sequence[str], rewards: Mapping[str, RewardFunction]
) -> dict[str, list[float]]:
    """Scores of one completion per prompt by every reward.

    Args:
        prompts: column `prompt`; further columns reach the rewards.
        texts: the completions.
        rewards: named reward functions.
    """
    columns = prompts[:]
    asked = columns.pop("prompt")
    given = as_completions(asked, texts)
    return {name: call_reward(f, asked, given, columns) for name, f in rewards.items()}


def sample_and_score(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    rewards: Mapping[str, RewardFunction],
    *,
    ref_policy: PreTrainedModel | None,
    temperature: float = 1.0,
    batch_size: int = 64,
    **sampling: Any,
) -> Samples:
    """One sampled completion per prompt, judged by every reward.

    Args:
        policy: the model to measure.
        tokenizer: its tokenizer.
        prompts, rewards: as in `judged`.
        ref_policy: what the KL is measured to; None: KL 0.
        temperature, batch_size, sampling: of `sample`.

    Raises:
        InputError: a prompt that is empty or does not fit into the context.
    """
    sampling |= {"temperature": temperature, "batch_size": batch_size}
    sampled = sample(policy, tokenizer, prompts["prompt"][:], **sampling)
    scores = judged(prompts, sampled.texts, rewards)
    kl = torch.zeros(len(sampled.texts))
    if ref_policy is not None:
        own, reference = (
            sequence_logprobs(m, sampled, temperature=temperature, batch_size=batch_size)
            for m in (policy, ref_policy)
        )
        kl = own - reference
    lengths, ended = sampled.completion_lengths.tolist(), sampled.ended.tolist()
    return Samples(sampled.texts, scores, kl.tolist(), lengths, ended)


def summarize(samples: Samples) -> dict[str, Any]:
    """Means of the samples: every score with its interval, KL, length, share ended."""
    scores = {name: mean_interval(s)._asdict() for name, s in samples.scores.items()}
    return {
        **scores,
        "kl": statistics.fmean(samples.kl),
        "length": statistics.fmean(samples.lengths),
        "ended": statistics.fmean(samples.ended),
    }


def shown_samples(
    prompts: Sequence[Any],
    completions: Mapping[str, Sequence[str]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
) -> list[dict[str, Any]]:
    """Per prompt what each model said to it, with its scores, by the model's name.

    Args:
        prompts: the first of them that are to be shown.
        completions: of each model.
        scores: of each model, by judge.
    """
    return [
        {
            "prompt": prompt,
            **{
                name: {
                    "completion": texts[row],
                    **{judge: values[row] for judge, values in scores[name].items()},
                }
                for name, texts in completions.items()
            },
        }
        for row, prompt in enumerate(prompts)
    ]
