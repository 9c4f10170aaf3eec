"""The losses of the reward model and of PPO: pure functions of tensors.

Those of PPO return one number per token and leave the averaging to the caller, because a minibatch
is averaged over the real tokens of all its micro-batches and processes, not over each one apart.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float
) -> Tensor:
    """Clipped surrogate objective, negated (Schulman et al. 2017, equation 7).

    ratio = policy / policy at sampling time;
    loss = max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange)).

    Args:
        logprobs, old_logprobs: `(B, C)` log-probabilities of the sampled tokens now and at
            sampling time.
        advantages: `(B, C)`.
        cliprange: 0.2 in InstructGPT.

    Returns:
        `(B, C)` loss per token.

    >>> policy_loss(torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]),
    ...             cliprange=0.2)
    tensor([[-1.2000]])
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio)


def policy_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float
) -> Tensor:
    """Where the clip cuts the policy's gradient: `(B, C)` bool, for policy/clipfrac."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return -advantages * clipped_ratio > -advantages * ratio


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> Tensor:
    """Clipped squared error of the value function (as in lm-human-preferences).

    loss = 0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    Args:
        values, old_values: `(B, C)` values now and at sampling time.
        returns: `(B, C)`.
        cliprange_value: c; 0.2.

    Returns:
        `(B, C)` loss per token.

    >>> value_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]),
    ...            cliprange_value=0.2)
    tensor([[0.3200]])
    """
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def value_clipped(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> Tensor:
    """Where the clip cuts the value's gradient: `(B, C)` bool, for val/clipfrac."""
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return (clipped - returns) ** 2 > (values - returns) ** 2


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Loss of a reward model on K-way rankings (InstructGPT 3.5, equation 1).

    - 1 / (number of pairs) * sum over pairs (w better than l) of log sigmoid(r_w - r_l), averaged
    per prompt first, then over prompts. Ties are no pairs.

    Args:
        scores: `(B, K)` scores of each prompt's responses.
        ranks: `(B, K)` 1 = best, equal = tie, 0 = no response.

    Returns:
        scalar; a ranking without any pair does not count.

    >>> ranking_loss(torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[1, 2, 0]]))
    tensor(0.3133)
    """
    there = ranks > 0
    better = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & there.unsqueeze(2) & there.unsqueeze(1)
    losses = -logsigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))
    pairs = better.sum(dim=(1, 2))
    per_prompt = torch.where(better, losses, 0.0).sum(dim=(1, 2)) / pairs.clamp(min=1)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of each token under the distribution it was sampled from.

    Args:
        logits: `(B, C, V)`.
        token_ids: `(B, C)`.
        temperature: the sampling temperature; logits are divided by it here as they were in
            sampling, else the importance ratio is wrong.

    Returns:
        `(B, C)` float32, nats.

    >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]]), temperature=1.0).exp()
    tensor([[0.2500]])
    """
    logits = logits.float() / temperature
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Entropy of each token's distribution.

    Args:
        logits: `(B, C, V)`.
        temperature: the sampling temperature.

    Returns:
        `(B, C)` nats.

    >>> entropy(torch.zeros(1, 1, 4), temperature=1.0).exp()
    tensor([[4.]])
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)
