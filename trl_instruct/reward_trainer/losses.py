"""The loss of the reward model: pure functions of tensors."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_instruct.data.ties import wins


def pair_weights(ranks: Tensor, weights: Tensor | None = None, *, ties: str = "drop") -> Tensor:
    """Weight of every comparison in the loss: averaged per prompt first, then over prompts.

    1 / (comparisons of the prompt) / (prompts), times the prompt's own weight. The mean is over the
    number of prompts, not over their weights, so it does not matter how a batch is split; use
    weights of mean 1. A prompt without comparisons does not count.

    From ranks `(B, K)` (1 = best, equal = tie, 0 = no response) and weights `(B,)` of the prompts
    (None: all 1), `(B, K, K)`: of response i over response j, 0 if that is not a comparison.

    >>> pair_weights(torch.tensor([[1, 2, 0]]))[0].tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    there = (ranks > 0).unsqueeze(2) & (ranks > 0).unsqueeze(1)
    others = ~torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    table = (there & others) * wins(ranks.unsqueeze(2), ranks.unsqueeze(1), ties=ties)
    pairs = table.sum(dim=(1, 2), keepdim=True)
    share = table / pairs.clamp(min=1) / (pairs > 0).sum().clamp(min=1)
    return share if weights is None else share * weights.view(-1, 1, 1)


def pair_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, *, center: float = 0.0) -> Tensor:
    """Loss of a reward model on comparisons, a scalar (InstructGPT 3.5, equation 1).

    - sum of weight * (log sigmoid(r_w - r_l) - center * (r_w + r_l)^2); the second term keeps the
    scores around 0 (Eisenstein et al. 2023, equation 2).

    `chosen` and `rejected` are r_w and r_l, scores of the better and the worse response, whose
    shapes must broadcast with the weights'; `center` is TRL's `center_rewards_coefficient`.
    """
    losses = center * (chosen + rejected) ** 2 - logsigmoid(chosen - rejected)
    return (weights * losses).sum()
