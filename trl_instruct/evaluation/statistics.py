"""Win rates, best of n, repetition and variety: pure functions of scores, lengths and tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_instruct.data.ties import wins
from trl_instruct.intervals import share_interval

NEWTON_STEPS = 50
# L2 penalty on both coefficients of the length-controlled win rate, in units of one completion.
PENALTY = 1.0
REPEATED = 4  # length of the n-grams whose repetition is measured


def win_rate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    groups: Sequence[int] | None = None,
) -> dict[str, float]:
    """How often a model beats a baseline, raw with its 95 % interval, and at equal length.

    A prompt is one value: both completions of it are compared with each other. Of two of the B
    scores by one judge, the higher wins, a tie counts half; lengths are in one unit. `groups`
    number each one's prompt, if several judges compared some; None: all differ. Returns mean, low,
    high (see `share_interval`) and length_controlled (see `length_controlled`).
    """
    both = torch.tensor([baseline_scores, scores], dtype=torch.float64)
    won = wins(*both, ties="half")
    longer = torch.tensor(lengths, dtype=torch.float64) - torch.tensor(baseline_lengths)
    rate = share_interval(won, None if groups is None else torch.tensor(groups))._asdict()
    return {**rate, "length_controlled": length_controlled(won, longer)}


def length_controlled(won: Tensor, longer: Tensor) -> float:
    """The win rate at equal length, of `(B,)` wins (1, 0, or one half).

    A logistic regression of the win on the length difference d, as in AlpacaEval 2 (Dubois et al.
    2024, Length-Controlled AlpacaEval, section 3; its prompt term needs many models to fit):

        P(win) = sigmoid(theta + phi * tanh(d / sd(d))),    length-controlled = sigmoid(theta)

    fitted to all B prompts by maximum likelihood less PENALTY / 2 * (theta^2 + phi^2). Without the
    penalty both diverge if all completions win, or all longer ones do. It pulls the rate a little
    towards one half: near it, by 4 / B of the way. If the two models are swapped, theta changes
    its sign and phi does not, so the two rates add up to 1. `longer` is d, `(B,)`: length minus the
    baseline's length; sd(d) has B in the denominator.
    """
    spread = longer.std(correction=0)
    slope = torch.tanh(longer / spread) if spread > 0 else torch.zeros_like(longer)
    inputs = torch.stack([torch.ones_like(slope), slope], dim=1)
    weights, penalty = inputs.new_zeros(2), PENALTY * torch.eye(2, dtype=inputs.dtype)
    for _ in range(NEWTON_STEPS):
        expected = torch.sigmoid(inputs @ weights)
        gradient = inputs.T @ (expected - won) + penalty @ weights
        variance = expected * (1 - expected)
        hessian = inputs.T @ (variance.unsqueeze(1) * inputs) + penalty
        weights = weights - torch.linalg.solve(hessian, gradient)
    return torch.sigmoid(weights[0]).item()


def best_of_n(picked_by: Tensor, scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Mean score of the sample that a judge picks as the best of n, for n = 1, 2, 4, ..., N.

    That judge's scores of N samples per prompt are `picked_by` `(B, N)`; all judges', of the same
    samples, `scores`. Per n: `n`, `kl` (see `best_of_n_kl`) and `scores`, the expected by judge.
    """
    points, most = [], picked_by.shape[1]
    for n in (*(2**power for power in range((most - 1).bit_length())), most):
        chances = chances_to_be_best(picked_by, n)
        means = {k: (chances * own).sum(dim=1).mean().item() for k, own in scores.items()}
        points.append({"n": n, "kl": best_of_n_kl(n), "scores": means})
    return points


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the policy it samples from, nats per completion: log n - (n - 1) / n.

    Stiennon et al. 2020, Learning to summarize from human feedback, G.3. Exact if no two samples
    are ever the same; otherwise an upper bound (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def chances_to_be_best(scores: Tensor, n: int) -> Tensor:
    """Probability that each sample is the best of n drawn from the N without replacement.

    From scores `(B, N)`, with n at most N; `(B, N)` float64, each row adds up to 1:
    (C(i, n) - C(i - 1, n)) / C(N, n) for the i-th sample in ascending order. With these weights all
    N samples give an unbiased estimate of lower variance than one set of n (Nakano et al. 2021,
    WebGPT, appendix I; used by Gao et al. 2022, Scaling Laws for Reward Model Overoptimization).
    Ties split their probabilities equally.
    """
    total = scores.shape[1]
    all_subsets = math.comb(total, n)
    shares = [math.comb(count, n) / all_subsets for count in range(total + 1)]
    within = torch.tensor(shares, dtype=torch.float64)
    ordered = scores.sort(dim=1).values
    below = torch.searchsorted(ordered, scores.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, scores.contiguous(), right=True)
    return (within[up_to] - within[below]) / (up_to - below)


def ngrams(tokens: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """All n-grams, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def repetition(completions: Sequence[Sequence[Any]]) -> float:
    """Share of a completion's 4-grams that repeat an earlier one, mean over the completions.

    1 - distinct 4-grams / 4-grams, "seq-rep-4" of Welleck et al. 2019 (Neural Text Generation with
    Unlikelihood Training). A completion of fewer than 4 tokens repeats nothing: 0.
    """
    shares = []
    for tokens in completions:
        found = ngrams(tokens, REPEATED)
        shares.append(1 - len(set(found)) / len(found) if found else 0.0)
    return sum(shares) / len(shares)


def distinct(completions: Sequence[Sequence[Any]], n: int) -> float:
    """Distinct n-grams of all completions together / all their n-grams; 0 if there are none.

    Li et al. 2016 (A Diversity-Promoting Objective Function for Neural Conversation Models) divide
    by the number of words, which is the same for n = 1; here 1 means that no n-gram repeats. The
    value falls with the number of completions: compare models on the same prompts.
    """
    found = [gram for tokens in completions for gram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else 0.0
