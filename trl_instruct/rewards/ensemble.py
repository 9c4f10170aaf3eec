"""Rewards that are harder to exploit: several as one careful judge, and a bounded one."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from trl_instruct.errors import InputError
from trl_instruct.rewards.function import RewardFunction, Scores, Texts, call_part, reward_name

COMBINATIONS = ("mean", "min", "pessimistic")


def combined(scores: Sequence[float], how: str, *, beta: float = 1.0) -> float:
    """The members' scores of a completion as one: their mean, their min, or pessimistic.

    pessimistic: r = -beta log mean exp(-r_i / beta); the mean as beta grows, the min as it goes to
    0. About mean - variance / (2 beta), the uncertainty-weighted optimisation of Coste et al. 2023,
    "Reward model ensembles help mitigate overoptimization".

    >>> [round(combined([0.0, 2.0], "pessimistic", beta=beta), 3) for beta in (0.01, 1.0, 100.0)]
    [0.007, 0.566, 0.995]
    """
    lowest = min(scores)
    if how != "pessimistic":
        return lowest if how == "min" else statistics.fmean(scores)
    return lowest - beta * math.log(statistics.fmean(math.exp((lowest - s) / beta) for s in scores))


class Ensemble:
    """Several rewards on one scale as one, such as reward models that differ by their data.

    A member that does not apply to a completion (None) is left out there. If the trainer passes
    TRL's `log_metric`, it logs disagreement: the standard deviation of the members' scores of a
    completion, mean over the batch. `combine` and `beta` are as in `combined`. InputError for fewer
    than two members or another `combine`.
    """

    def __init__(
        self, rewards: Sequence[RewardFunction], combine: str = "mean", *, beta: float = 1.0
    ):
        self.parts, self.combine, self.beta = list(rewards), combine, beta
        self.__name__ = f"{combine} of {', '.join(map(reward_name, rewards))}"
        if combine not in COMBINATIONS or len(self.parts) < 2:
            raise InputError(
                f"combine is {combine!r} for {len(self.parts)} reward(s); one of "
                f"{', '.join(COMBINATIONS)} and at least two rewards are needed."
            )

    def __call__(
        self, prompts: Texts, completions: Texts, log_metric: Any = None, **columns: Any
    ) -> Scores:
        """Scores of the completions, None where no member applies."""
        members = [call_part(part, prompts, completions, columns) for part in self.parts]
        rows = [[s for s in row if s is not None] for row in zip(*members, strict=True)]
        if log_metric is not None and any(rows):
            log_metric("disagreement", statistics.fmean(statistics.pstdev(r) for r in rows if r))
        return [combined(row, self.combine, beta=self.beta) if row else None for row in rows]


class Bounded:
    """sigmoid(score): between 0 and 1, so that more score than enough gains nothing.

    With the shift of `rm` a score is relative to the demonstrations' mean, the reference; this is
    PAR of Fu et al. 2025, "Reward shaping to mitigate reward hacking in RLHF".

    >>> Bounded(lambda prompts, completions: [0.0, 2.0])(["a"] * 2, ["b"] * 2)
    [0.5, 0.8807970779778824]
    """

    def __init__(self, reward: RewardFunction):
        self.parts, self.__name__ = [reward], f"bounded {reward_name(reward)}"

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Scores:
        """Scores of the completions, None where the reward does not apply."""
        scores = call_part(self.parts[0], prompts, completions, columns)
        return [s if s is None else (1 + math.tanh(s / 2)) / 2 for s in scores]
