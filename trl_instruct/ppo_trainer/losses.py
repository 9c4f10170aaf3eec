"""The losses of PPO: pure functions of tensors.

They return `(N,)` each: the loss per token, and bool, whether the clip removes its gradient. The
averaging is the caller's, because the mean is over all real tokens of a minibatch, in all its
micro-batches and processes.
"""

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate objective, negated (Schulman et al. 2017, equation 7).

    ratio = policy / policy at sampling time;
    loss = max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange_high)).

    Log-probabilities of tokens, now and at sampling time, and advantages A are `(N,)`. cliprange
    is 0.2 in InstructGPT, cliprange_high the clip above 1 (Yu et al. 2025, DAPO, equation 10; None:
    cliprange). dual_clip is c: with A < 0 the loss is at most -A * c (Ye et al. 2020, equation 5).

    >>> policy_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), cliprange=0.2)
    (tensor([-1.2000]), tensor([True]))
    >>> policy_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([-1.0]), cliprange=0.2,
    ...             dual_clip=3.0)
    (tensor([3.]), tensor([True]))
    """
    ratio = torch.exp(logprobs - old_logprobs)
    high = cliprange if cliprange_high is None else cliprange_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + high)
    loss, flat = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is None:
        return loss, flat
    limit = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
    return torch.minimum(loss, limit), flat | (loss > limit)


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, *, clip_max: float) -> Tensor:
    """Truncated importance sampling of tokens that a sampler drew: `(N,)` weights of losses.

    weight = min(policy / sampler, clip_max), both before the update; 1 where the sampler's
    log-probability is NaN. All are `(N,)`. Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"; in TRL's GRPO, `token_truncate`, with clip_max 3.

    >>> likely, drawn = torch.tensor([0.2, 0.9, 0.5]).log(), torch.tensor([0.4, 0.1, torch.nan])
    >>> importance_weights(likely, drawn.log(), clip_max=3.0)
    tensor([0.5000, 3.0000, 1.0000])
    """
    return (logprobs - sampler_logprobs).nan_to_num(nan=0.0).exp().clamp(max=clip_max)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Clipped squared error of the value function (as in lm-human-preferences).

    loss = 0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    Values V now, V_old at sampling time, and returns R are `(N,)`; c is 0.2.

    >>> value_loss(torch.ones(1), torch.zeros(1), torch.ones(1), cliprange_value=0.2)
    (tensor([0.3200]), tensor([True]))
    """
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain
