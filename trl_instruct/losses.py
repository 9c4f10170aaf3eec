"""The losses of the reward model and of PPO: pure functions of tensors.

Those of PPO return one number for each of N tokens and leave the averaging to the caller, because a
minibatch is averaged over the real tokens of all its micro-batches and processes, not over each one
apart.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

TOKENS_AT_ONCE = 64


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float
) -> Tensor:
    """Clipped surrogate objective, negated (Schulman et al. 2017, equation 7).

    ratio = policy / policy at sampling time;
    loss = max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange)).

    Args:
        logprobs, old_logprobs: `(N,)` log-probabilities of the sampled tokens now and at
            sampling time.
        advantages: `(N,)`.
        cliprange: 0.2 in InstructGPT.

    Returns:
        `(N,)` loss per token.

    >>> policy_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), cliprange=0.2)
    tensor([-1.2000])
    """
    return torch.maximum(*_surrogates(logprobs, old_logprobs, advantages, cliprange))


def policy_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float
) -> Tensor:
    """Where the clip cuts the policy's gradient: `(N,)` bool, for policy/clipfrac."""
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, cliprange)
    return clipped > plain


def _surrogates(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """-A * ratio with the ratio as it is, and clipped."""
    ratio = torch.exp(logprobs - old_logprobs)
    return -advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> Tensor:
    """Clipped squared error of the value function (as in lm-human-preferences).

    loss = 0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    Args:
        values, old_values: `(N,)` values now and at sampling time.
        returns: `(N,)`.
        cliprange_value: c; 0.2.

    Returns:
        `(N,)` loss per token.

    >>> value_loss(torch.ones(1), torch.zeros(1), torch.ones(1), cliprange_value=0.2)
    tensor([0.3200])
    """
    return 0.5 * torch.maximum(*_squared_errors(values, old_values, returns, cliprange_value))


def value_clipped(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> Tensor:
    """Where the clip cuts the value's gradient: `(N,)` bool, for val/clipfrac."""
    plain, clipped = _squared_errors(values, old_values, returns, cliprange_value)
    return clipped > plain


def _squared_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """(V - R)^2 with the value as it is, and clipped around the old one."""
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return (values - returns) ** 2, (clipped - returns) ** 2


def pair_weights(ranks: Tensor, weights: Tensor | None = None, *, ties: str = "drop") -> Tensor:
    """Weight of every comparison in the loss: averaged per prompt first, then over prompts.

    1 / (comparisons of the prompt) / (prompts), times the prompt's own weight. The mean is over the
    number of prompts, not over their weights, so that it does not matter how a batch is cut; give
    weights of mean 1. A prompt without any comparison does not count.

    Args:
        ranks: `(B, K)` 1 = best, equal = tie, 0 = no response.
        weights: `(B,)` of the prompts; None: all 1.
        ties: "drop", or "half": a tie is a comparison that each of the two wins by half.

    Returns:
        `(B, K, K)`: of response i over response j, 0 where that is no comparison.

    >>> pair_weights(torch.tensor([[1, 2, 0]]))[0].tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    there = (ranks > 0).unsqueeze(2) & (ranks > 0).unsqueeze(1)
    table = (there & (ranks.unsqueeze(2) < ranks.unsqueeze(1))).float()
    if ties == "half":
        other = ~torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
        table = table + 0.5 * (there & other & (ranks.unsqueeze(2) == ranks.unsqueeze(1)))
    pairs = table.sum(dim=(1, 2), keepdim=True)
    share = table / pairs.clamp(min=1) / (pairs > 0).sum().clamp(min=1)
    return share if weights is None else share * weights.view(-1, 1, 1)


def pair_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, *, center: float = 0.0) -> Tensor:
    """Loss of a reward model on comparisons (InstructGPT 3.5, equation 1).

    - sum of weight * (log sigmoid(r_w - r_l) - center * (r_w + r_l)^2); the second term keeps the
    scores around 0 (Eisenstein et al. 2023, equation 2).

    Args:
        chosen, rejected: r_w and r_l, scores of the better and of the worse response.
        weights: of the comparisons; the three have shapes that broadcast.
        center: TRL's `center_rewards_coefficient`.

    Returns:
        scalar.
    """
    losses = center * (chosen + rejected) ** 2 - logsigmoid(chosen - rejected)
    return (weights * losses).sum()


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Loss of a reward model on K-way rankings: `pair_loss` with the weights of `pair_weights`.

    Args:
        scores: `(B, K)` scores of each prompt's responses; finite where there is none.
        ranks: `(B, K)` 1 = best, equal = tie, 0 = no response.

    Returns:
        scalar; a ranking without any pair does not count.

    >>> ranking_loss(torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[1, 2, 0]]))
    tensor(0.3133)
    """
    return pair_loss(scores.unsqueeze(2), scores.unsqueeze(1), pair_weights(ranks))


def log_distribution(logits: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of every token of the vocabulary under the distribution sampled from.

    The one tensor of this size that a step computes: log-probabilities, their gradient and the
    entropy all come from it.

    Args:
        logits: `(N, V)`.
        temperature: the sampling temperature; logits are divided by it here as they were in
            sampling, else the importance ratio is wrong.

    Returns:
        `(N, V)` float32, nats.

    >>> log_distribution(torch.zeros(1, 4), temperature=1.0).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def token_logprobs(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of each token.

    Args:
        log_probs: `(N, V)`, a `log_distribution`.
        token_ids: `(N,)`.

    Returns:
        `(N,)` nats.

    >>> token_logprobs(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor([-2.])
    """
    return log_probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def logprobs_in_parts(logits: Tensor, token_ids: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of each token, where no gradient is needed: `(N,)` nats.

    Some tokens at a time, so that there is no second tensor of the logits' size.

    Args:
        logits: `(N, V)`.
        token_ids: `(N,)`.
        temperature: as in `log_distribution`.

    >>> logprobs_in_parts(torch.zeros(2, 4), torch.tensor([0, 3]), temperature=1.0).exp()
    tensor([0.2500, 0.2500])
    """
    parts = zip(logits.split(TOKENS_AT_ONCE), token_ids.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat(
        [token_logprobs(log_distribution(p, temperature=temperature), ids) for p, ids in parts]
    )


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of each token's distribution.

    Args:
        log_probs: `(N, V)`, a `log_distribution`.

    Returns:
        `(N,)` nats.

    >>> entropy(log_distribution(torch.zeros(1, 4), temperature=1.0)).exp()
    tensor([4.])
    """
    return -torch.linalg.vecdot(log_probs.exp(), log_probs)
