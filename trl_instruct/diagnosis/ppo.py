"""Findings of a PPO run: its own logs against thresholds."""

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from trl_instruct.diagnosis.finding import LIMITS, Finding, found
from trl_instruct.ppo_trainer.roles import FROM_POLICY, VALUE_HEAD
from trl_instruct.recipes.chain import FinishedStage
from trl_instruct.rewards.load import is_address, is_python

PPO = LIMITS["ppo"]
_found = partial(found, "ppo")


def diagnose_ppo(run: FinishedStage) -> Iterator[Finding]:
    """What the checks find whose metrics the run has logged (TRL's own trainer lacks some).

    A run that `stop_when_exploited` ended is as long as its result, up to the judge's peak.
    """
    if not run.curve("objective/kl"):
        yield _found("ppo_unmeasured")
        return
    peak = run.metrics.get("peak_iteration")
    if peak is not None:
        run = run._replace(logs=[log for log in run.logs if log["step"] <= peak])
    for check, *needed in CHECKS:
        ended = peak is not None and check is _episodes  # on purpose
        if not ended and all(run.curve(name) for name in needed):
            yield from check(run)


def _over_optimisation(run: FinishedStage) -> Iterator[Finding]:
    steps = [step for step, _ in run.curve("objective/gold")]
    if len(steps) < PPO.LEAST_ITERATIONS:
        return
    gold, scores = (_smooth(run.values(f"objective/{n}")) for n in ("gold", "scores"))
    best = max(range(len(gold)), key=gold.__getitem__)
    fall = gold[best] - gold[-1]
    if fall > PPO.STANDARD_ERRORS * _error(run.values("objective/gold")) and scores[-1] > scores[0]:
        ends = {"scores": (scores[0], scores[-1]), "gold": (gold[best], gold[-1])}
        yield _found("over_optimised", turned=steps[best], **ends)


def _kl(run: FinishedStage) -> Iterator[Finding]:
    kl, per_token = _ends(run, "objective/kl")[1], _kl_per_token(run)
    free = run.config.get("kl_coef") == 0
    most = PPO.MOST_FREE_KL if free else PPO.MOST_KL
    measured: Any = {"kl": kl, "per_token": per_token, "most": most}
    if per_token > most and not free and _gold_rose(run):
        yield _found("kl_paid", **measured)
    elif per_token > most:
        yield _found("kl_blow_up", free=" if kl_coef is 0" * free, **measured)
    elif per_token < PPO.LEAST_KL:
        yield _found("kl_negative", **measured)


def _gold_rose(run: FinishedStage) -> bool:
    """Whether the judge that PPO is not trained on ends near its best, well above its start."""
    values = run.values("objective/gold")
    if len(values) < PPO.LEAST_ITERATIONS:
        return False
    gold, least = _smooth(values), PPO.STANDARD_ERRORS * _error(values) + 1e-9  # rounding
    return gold[-1] > gold[0] + least and gold[-1] >= max(gold) - least


def _entropy(run: FinishedStage) -> Iterator[Finding]:
    was, entropy = _ends(run, "policy/entropy")
    if entropy < PPO.LEAST_ENTROPY * was:
        yield _found("entropy_collapse", was=was, now=entropy)


def _length(run: FinishedStage) -> Iterator[Finding]:
    was, length = _ends(run, "objective/length")
    if not 1 / PPO.MOST_LENGTH <= length / was <= PPO.MOST_LENGTH:
        longer = "longer" if length > was else "shorter"
        yield _found("length_drift", was=was, now=length, longer=longer)


def _ended(run: FinishedStage) -> Iterator[Finding]:
    was, ended = _ends(run, "objective/ended")
    # The continuation of an opening is cut at a length; it has no end of its own.
    if ended < PPO.LEAST_ENDED and not run.config.get("opening_length"):
        yield _found("missing_eos", was=was, now=ended)


def _value(run: FinishedStage) -> Iterator[Finding]:
    explained = run.values("val/explained_variance")
    late = statistics.fmean(explained[len(explained) // 2 :])
    if late < PPO.LEAST_EXPLAINED:
        start = ", or a value function that starts from a reward model (value_model_path)"
        if _value_from_reward(run):
            start = "; the value function starts from the reward model already"
        yield _found("value_useless", late=late, or_from_reward=start)


def _value_from_reward(run: FinishedStage) -> bool:
    """Whether the value function started from a reward model, as the config tells."""
    named = run.config.get("value_model_path") or run.config.get("reward_model_path")
    sole = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(sole, str) or sole in (FROM_POLICY, VALUE_HEAD):
        return False
    return not (is_address(sole) or is_python(sole))


def _steps(run: FinishedStage) -> Iterator[Finding]:
    clipped = statistics.fmean(run.values("policy/clipfrac"))
    moved = _kl_per_token(run)
    if clipped > PPO.MOST_CLIPPED:
        yield _found("clipped_much", clipped=clipped)
    elif clipped == 0 and abs(moved) < PPO.LEAST_MOVED:
        yield _found("hardly_moved", moved=moved)


def _episodes(run: FinishedStage) -> Iterator[Finding]:
    curve = run.curve("objective/rlhf_reward")
    rewards, iterations = [reward for _, reward in curve], curve[-1][0]
    fifth = len(rewards) // 5
    if iterations >= PPO.LEAST_ITERATIONS > len(rewards):
        return  # too few logs to tell
    if iterations >= PPO.LEAST_ITERATIONS:
        late, before = rewards[-fifth:], rewards[-2 * fifth : -fifth]
        rise = statistics.fmean(late) - statistics.fmean(before)
        gain = statistics.fmean(late) - statistics.fmean(rewards[:fifth])
        if rise <= max(PPO.STILL_RISING * gain, PPO.STANDARD_ERRORS * _error(rewards)):
            return
        how_far = f"{rise:.2f} of {gain:.2f} gained in the last fifth of the iterations"
    else:
        how_far = f"{iterations} iterations"
    yield _found("too_few_episodes", how_far=how_far)


# Each check with the metrics it needs.
CHECKS: tuple[tuple[Any, ...], ...] = (
    (_over_optimisation, "objective/gold", "objective/scores"),
    (_kl, "objective/kl", "objective/length"),
    (_entropy, "policy/entropy"),
    (_length, "objective/length"),
    (_ended, "objective/ended"),
    (_value, "val/explained_variance"),
    (_steps, "policy/clipfrac", "objective/kl", "objective/length"),
    (_episodes, "objective/rlhf_reward"),
)


def _kl_per_token(run: FinishedStage) -> float:
    return _ends(run, "objective/kl")[1] / max(_ends(run, "objective/length")[1], 1.0)


def _ends(run: FinishedStage, name: str) -> tuple[float, float]:
    """Means of the first and of the last tenth of a curve."""
    values = run.values(name)
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def _window(values: Sequence[float]) -> int:
    return max(3, len(values) // 6)


def _smooth(values: Sequence[float]) -> list[float]:
    """Trailing mean over a sixth of the curve (at least 3 points, fewer at its start)."""
    window = _window(values)
    return [
        statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)
    ]


def _error(values: Sequence[float]) -> float:
    """Standard error of the difference of two smoothed points, from differences of neighbours.

    With noise of variance s^2 per point, neighbours differ with variance 2 s^2, and the means of
    two windows of n points with 2 s^2 / n. A slow trend adds little.
    """
    jumps = [b - a for a, b in pairwise(values)]
    return math.sqrt(statistics.fmean(j * j for j in jumps) / _window(values))
