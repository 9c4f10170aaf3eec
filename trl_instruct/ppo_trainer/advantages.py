"""From scores to rewards to advantages: pure functions of tensors."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values `(B, T)` where the mask `(B, T)` is True, all tokens alike; 0 if nowhere.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the values `(B, T)` where the mask `(B, T)` is True.

    The variance of a single value is 0.
    """
    mean, count = masked_mean(values, mask), mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    return mean, variance


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Values scaled to variance 1 over the real tokens and shifted to mean 0; others are 0.

    Values and mask are `(B, T)`. Without `shift_mean` the mean stays (for rewards, whose sign has a
    meaning). `moments` are mean and unbiased variance (as in lm-human-preferences and TRL) over all
    processes; default: those of the values.

    >>> masked_whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [[-0.7071067690849304, 0.7071067690849304, 0.0]]
    """
    mean, variance = moments or masked_moments(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Estimate of KL(policy || ref_policy) at each sampled token: `(B, C)` nats.

    With r = ref(token) / policy(token) and tokens sampled from the policy:
    k1 = -log r (unbiased, may be negative: clamping it would bias it);
    k3 = (r - 1) - log r (unbiased, never negative, lower variance).
    Schulman, http://joschu.net/blog/kl-approx.html. As a penalty in the reward, k1 has the gradient
    of the KL; k3 has that of KL(policy || ref) - KL(ref || policy), so it is only logged.

    Both arguments are `(B, C)` log-probabilities of the sampled tokens, nats.

    >>> kl_per_token(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.5000]])
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k3":
        return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f"kl_estimator is {estimator!r}; it must be 'k1' or 'k3'.")


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token, `(B, C)`: the KL penalty everywhere, the score at the last; 0 after it.

    R(x, y) = r(x, y) - beta * log(policy(y|x) / ref(y|x)), InstructGPT equation 2, spread over
    the tokens: each token bears its own penalty; the last one (EOS included) gets the score.

    From scores `(B,)`, the KL `(B, C)` of each token, nats, and completion lengths `(B,)`.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[0.5, 0.5, 9.0]]), torch.tensor([2]),
    ...               kl_coef=0.1)
    tensor([[-0.0500,  0.9500,  0.0000]])
    """
    columns = torch.arange(kl.shape[1], device=kl.device)
    last = columns == (lengths - 1).unsqueeze(1)
    penalty = torch.where(columns < lengths.unsqueeze(1), -kl_coef * kl, 0.0)
    return penalty + last * scores.unsqueeze(1)


def adapted_kl_coef(
    kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int
) -> float:
    """beta for the next iteration: raised if the KL is above its target, lowered if below.

    e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta * (1 + e * episodes / horizon)
    (Ziegler et al. 2019, section 2.2, with the horizon of lm-human-preferences).

    The KL and its target are nats per completion; `episodes` are those of an iteration, `horizon`
    those in which a KL at least 20 % off its target changes beta by 20 %.

    >>> round(adapted_kl_coef(0.1, 12.0, target=6.0, horizon=1000, episodes=500), 6)
    0.11
    >>> round(adapted_kl_coef(0.1, 5.7, target=6.0, horizon=1000, episodes=1000), 6)
    0.095
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def length_adaptive_lam(lengths: Tensor, *, alpha: float) -> Tensor:
    """lambda of each completion, `(B,)`: 1 - 1 / (alpha * length), at least 0.

    The weights of GAE then sum to alpha * length: long completions get less bias, short ones less
    variance (Yue et al. 2025, VAPO, section 4.2, with alpha = 0.05). Lengths are `(B,)` tokens.

    >>> length_adaptive_lam(torch.tensor([10, 40, 100]), alpha=0.05)
    tensor([0.0000, 0.5000, 0.8000])
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1))).clamp(min=0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11-16).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};
    the value after the last token is 0, because the episode is over.

    Rewards r_t, values V_t of the state in which token t was chosen, and the mask, True on
    completion tokens, are `(B, C)`; gamma is the discount (InstructGPT: 1), lam lambda, or `(B,)`.
    Returns advantages and returns (= advantages + values), `(B, C)`, 0 outside the mask.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]),
    ...     gamma=1.0, lam=0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    values = torch.where(mask, values, 0.0)
    rewards = torch.where(mask, rewards, 0.0)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    reversed_advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        reversed_advantages.append(next_advantage)
    advantages = torch.where(mask, torch.stack(reversed_advantages[::-1], dim=1), 0.0)
    return advantages, advantages + values


def advantages_and_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    lam_alpha: float | None = None,
    value_lam: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages as in `gae`, and the returns that the value function learns: each `(B, C)`.

    `lam_alpha` is alpha of `length_adaptive_lam`, whose lambdas replace lam; `value_lam` is lambda
    of the returns (Yuan et al. 2025, VC-PPO, section 3.2); None: as in `gae`.
    """
    given = rewards, values, mask
    used = lam if lam_alpha is None else length_adaptive_lam(mask.sum(dim=1), alpha=lam_alpha)
    advantages, returns = gae(*given, gamma=gamma, lam=used)
    if value_lam is not None:
        returns = gae(*given, gamma=gamma, lam=value_lam)[1]
    return advantages, returns
