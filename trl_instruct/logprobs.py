"""Log-probabilities of tokens and entropy of their distribution: pure functions of tensors."""

import torch
from torch import Tensor

TOKENS_AT_ONCE = 64


def log_distribution(logits: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of every token of the vocabulary under the sampling distribution.

    The only tensor of this size in a step: log-probabilities, their gradient and entropy use it.
    Logits `(N, V)` are divided by the temperature of sampling, or the importance ratio is wrong;
    the result is `(N, V)` float32, nats.
    """
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def token_logprobs(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of each token, `(N,)` nats, from a `log_distribution` `(N, V)`."""
    return log_probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def logprobs_in_parts(logits: Tensor, token_ids: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of each token, from logits `(N, V)`, if no gradient is needed: `(N,)` nats.

    Computed in parts, to avoid a second tensor of the logits' size.
    """
    parts = zip(logits.split(TOKENS_AT_ONCE), token_ids.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat(
        [token_logprobs(log_distribution(p, temperature=temperature), ids) for p, ids in parts]
    )


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of each token's distribution, `(N,)` nats, from a `log_distribution` `(N, V)`."""
    return -torch.linalg.vecdot(log_probs.exp(), log_probs)
