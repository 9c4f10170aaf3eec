"""Rewards built from rewards: sum, ensemble, bounds, running normalisation, length penalty."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from trl_instruct.errors import InputError
from trl_instruct.rewards import function
from trl_instruct.rewards.function import RewardFunction, Scores, Texts, call_part, reward_name

COMBINATIONS = ("mean", "min", "pessimistic")


class WeightedSum:
    """The weighted sum of the scores of all rewards that apply, as in TRL; default weights are 1.

    Raises:
        InputError: no rewards, or a wrong number of weights.
    """

    def __init__(self, rewards: Sequence[RewardFunction], weights: Sequence[float] | None = None):
        self.parts, self.__name__ = list(rewards), " + ".join(map(reward_name, rewards))
        self.weights = [1.0] * len(self.parts) if weights is None else list(weights)
        if not self.parts or len(self.weights) != len(self.parts):
            raise InputError(
                f"{len(self.weights)} reward weights were given for {len(self.parts)} rewards; "
                "one weight per reward is needed."
            )

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Scores:
        """Scores of the completions, None where no reward applies."""
        scores = [call_part(part, prompts, completions, columns) for part in self.parts]
        weighted = (zip(self.weights, row, strict=True) for row in zip(*scores, strict=True))
        given = [[w * s for w, s in row if s is not None] for row in weighted]
        return [sum(row) if row else None for row in given]


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
        if log_metric is not None:
            columns["log_metric"] = log_metric
        members = [call_part(part, prompts, completions, columns) for part in self.parts]
        rows = [[s for s in row if s is not None] for row in zip(*members, strict=True)]
        if log_metric is not None and any(rows):
            log_metric("disagreement", statistics.fmean(statistics.pstdev(r) for r in rows if r))
        return [combined(row, self.combine, beta=self.beta) if row else None for row in rows]


class Clipped:
    """A reward's scores, clipped to [low, high]; by default neither bound clips."""

    def __init__(self, reward: RewardFunction, *, low: float = -math.inf, high: float = math.inf):
        self.parts, self.__name__ = [reward], f"clipped {reward_name(reward)}"
        self.low, self.high = low, high
        if self.low > self.high:
            raise InputError(f"Scores cannot be clipped to [{low}, {high}]: low is above high.")

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Scores:
        """Scores of the completions, None where the reward does not apply."""
        scores = call_part(self.parts[0], prompts, completions, columns)
        return [s if s is None else min(self.high, max(self.low, s)) for s in scores]


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


class Moments(NamedTuple):
    """How many scores were seen, their mean and their sum of squared deviations."""

    seen: int = 0
    mean: float = 0.0
    squares: float = 0.0


def pooled(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together (Chan et al. 1979); a score is a part with that mean.

    >>> pooled([Moments(2, mean=2.0, squares=2.0), Moments(1, mean=8.0)])
    Moments(seen=3, mean=4.0, squares=26.0)
    """
    held = list(parts)
    seen = sum(part.seen for part in held)
    mean = sum(part.seen * part.mean for part in held) / max(1, seen)
    squares = sum(part.squares + part.seen * (part.mean - mean) ** 2 for part in held)
    return Moments(seen, mean, squares)


class Normalised:
    """A reward's scores, normalised by the mean and deviation of all its scores so far.

    (score - mean) / max(std, 1e-8), with the current batch included and std over n - 1 scores; of
    a single score only the mean is subtracted. Every call adds to the moments: do not evaluate with
    the object that trains. All processes start an iteration of PPO with the same moments; within
    one, each adds its own batch.
    """

    def __init__(self, reward: RewardFunction):
        self.parts, self.__name__ = [reward], f"normalised {reward_name(reward)}"
        self.shared, self.own = Moments(), Moments()

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Scores:
        """Scores of the completions, None where the reward does not apply."""
        scores = call_part(self.parts[0], prompts, completions, columns)
        self.own = pooled([self.own, *(Moments(1, score) for score in scores if score is not None)])
        count, mean, squares = pooled([self.shared, self.own])
        std = max(math.sqrt(squares / (count - 1)), 1e-8) if count > 1 else 1.0
        return [s if s is None else (s - mean) / std for s in scores]

    def state_dict(self) -> dict[str, Any]:
        """The moments: of all processes up to the last `merge`, and this one's since."""
        return {"shared": list(self.shared), "own": list(self.own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the moments."""
        self.shared, self.own = Moments(*state["shared"]), Moments(*state["own"])

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Add what all processes, this one included, have seen since the last merge."""
        self.shared = pooled([self.shared, *(Moments(*state["own"]) for state in states)])
        self.own = Moments()


class TimeLimit:
    """A reward that counts as unreachable if a call takes longer than `seconds`.

    Python cannot end the call: its thread goes on until the process ends.
    """

    def __init__(self, reward: RewardFunction, seconds: float):
        if not seconds > 0:
            raise InputError(f"A time limit of {seconds} seconds was given; it must be above 0.")
        self.parts, self.seconds, self.__name__ = [reward], seconds, reward_name(reward)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Scores:
        """Scores of the completions, None where the reward does not apply."""
        given = prompts, completions, columns
        try:
            return function.within(self.seconds, lambda: call_part(self.parts[0], *given))
        except TimeoutError as error:
            raise function.RewardUnreachableError(
                f"Reward {self.__name__!r} did not return within {self.seconds:g} seconds for "
                f"{len(completions)} completions. Mend it, or set another time limit."
            ) from error


class LengthPenalty:
    """A reward to add to others: -per_character for each character after the first `free`."""

    def __init__(self, per_character: float, *, free: int = 0):
        self.per_character, self.free = per_character, free

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> list[float]:
        """Scores of the completions, one float each."""
        texts = map(function.as_text, completions)
        excess = [max(0, len(text) - self.free) for text in texts]
        return [-self.per_character * characters for characters in excess]
