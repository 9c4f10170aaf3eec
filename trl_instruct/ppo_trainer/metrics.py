"""What PPO logs, under the names of lm-human-preferences and TRL: pure functions."""

import statistics
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl_instruct.ppo_trainer.advantages import kl_per_token, masked_mean, masked_moments
from trl_instruct.ppo_trainer.rollouts import Rollout


def iteration_metrics(
    accelerator: Accelerator, rollout: Rollout, kl: Tensor, returns: Tensor, *, kl_coef: float
) -> dict[str, float]:
    """`episode_metrics` and `value_metrics` over all processes; each passes its own episodes.

    sampling/logprob_diff: mean difference of a sampler's own log-probabilities, nats, to those.
    """
    count = rollout.scored.sum()
    total = accelerator.reduce(count, "sum")
    means = {
        name: accelerator.reduce(mean * count, "sum") / total
        for name, mean in episode_metrics(rollout, kl, kl_coef=kl_coef).items()
    }
    means |= value_metrics(*accelerator.gather((rollout.values, returns, rollout.mask)))
    if rollout.sampler_logprobs is not None:
        apart = (rollout.logprobs - rollout.sampler_logprobs).abs()
        found = accelerator.gather((apart, rollout.mask & ~apart.isnan()))
        means["sampling/logprob_diff"] = masked_mean(*found)
    return {name: float(mean) for name, mean in means.items()}


def episode_metrics(rollout: Rollout, kl: Tensor, *, kl_coef: float) -> dict[str, Tensor]:
    """Means over the episodes that have a score; KL and entropy are sums over the real tokens.

    Scalars by name; `objective/rlhf_reward` is what the paper maximises. The B episodes have a
    per-token KL `(B, C)` in nats; `kl_coef` is beta.
    """
    mask = rollout.mask
    k3 = kl_per_token(rollout.logprobs, rollout.ref_logprobs, estimator="k3")
    kl = torch.where(mask, kl, 0.0).sum(dim=1)
    penalty = -kl_coef * kl
    per_episode = {
        "objective/kl": kl,
        "objective/kl_k3": torch.where(mask, k3, 0.0).sum(dim=1),
        "objective/entropy": -torch.where(mask, rollout.logprobs, 0.0).sum(dim=1),
        "objective/non_score_reward": penalty,
        "objective/scores": rollout.scores,
        "objective/rlhf_reward": rollout.scores + penalty,
        "objective/length": rollout.completion_lengths.float(),
        "objective/ended": rollout.ended.float(),
    }
    return {name: masked_mean(values, rollout.scored) for name, values in per_episode.items()}


def value_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Mean of the values, and how much of the returns' variance they explain.

    All are `(B, C)`, at sampling time; the mask is True on completion tokens. `val/mean`, and
    `val/explained_variance` = 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is no
    better than a constant; also 0 if all returns are equal.
    """
    _, variance = masked_moments(returns, mask)
    _, unexplained = masked_moments(returns - values, mask)
    explained = torch.where(variance > 0, 1 - unexplained / variance, 0.0)
    return {"val/mean": masked_mean(values, mask), "val/explained_variance": explained}


@torch.no_grad()
def policy_metrics(logprobs: Tensor, old_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled: `(N,)` each."""
    log_ratio = logprobs - old_logprobs
    return {"policy/approxkl": 0.5 * log_ratio**2, "val/ratio": log_ratio.exp()}


def step_means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps of an iteration, and the ratio's variance."""
    means = {name: statistics.fmean(step[name] for step in steps) for name in steps[0]}
    variance = statistics.pvariance(step["val/ratio"] for step in steps)
    return {**means, "val/ratio_var": variance, "policy/steps": len(steps)}


def told_means(told: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean of each number that the rewards of any process told in an iteration."""
    everywhere = gather_object([dict(told)])
    names = sorted({name for part in everywhere for name in part})
    return {n: statistics.fmean(v for part in everywhere for v in part.get(n, ())) for n in names}


def check_finite(means: Mapping[str, Tensor], iteration: int) -> None:
    """FloatingPointError if a loss is not finite, before it reaches the weights or a checkpoint.

    With DeepSpeed the weights have changed already: its backward pass takes the step. `means` are
    over all processes, so all of them stop; `iteration` counts from 1.
    """
    for name in ("loss/policy", "loss/value"):
        if not torch.isfinite(means[name]):
            raise FloatingPointError(
                f"{name} is {means[name].item()} in iteration {iteration}. "
                "Lower learning_rate, set max_grad_norm, or use bf16 instead of fp16."
            )
