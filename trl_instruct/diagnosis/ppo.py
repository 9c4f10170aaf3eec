"""Findings of a PPO run: its own logs against thresholds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from trl_instruct.diagnosis.stages import Finding
from trl_instruct.ppo_trainer.roles import FROM_POLICY, VALUE_HEAD
from trl_instruct.recipes.chain import FinishedStage
from trl_instruct.rewards.load import is_address, is_python

# PPO, comparing the first and the last tenth of the iterations.
MOST_KL = 0.5  # nats per token
MOST_FREE_KL = 0.25  # the same without a penalty: KL is still growing then
LEAST_KL = -0.02  # nats per token; only a mean over samples can be below 0
LEAST_ENTROPY = 0.25  # of its first value
MOST_LENGTH = 1.5  # times as long, or as short
LEAST_ENDED = 0.9
LEAST_EXPLAINED = 0.05
MOST_CLIPPED = 0.3
LEAST_MOVED = 0.01  # nats per token, from the reference
LEAST_ITERATIONS = 10
STILL_RISING = 0.15  # share of the whole gain that came in the last fifth
STANDARD_ERRORS = 3.0


def diagnose_ppo(run: FinishedStage) -> Iterator[Finding]:
    """Exploited reward, KL, entropy, length, EOS, value function, clipping, number of episodes.

    Args:
        run: a finished `ppo`. Metrics it did not log are skipped: gold without `gold` in its
            config, and length and some others with TRL's own trainer.
    """
    if not run.curve("objective/kl"):
        told = "PPO could not be checked."
        figure = "no logs in its folder"
        advice = "Leave logging_steps at 1."
        yield Finding("ppo", "ppo_unmeasured", told, figure, advice, level="unknown")
        return
    for check, *needed in CHECKS:
        if all(run.curve(name) for name in needed):
            yield from check(run)


def _over_optimisation(run: FinishedStage) -> Iterator[Finding]:
    steps = [step for step, _ in run.curve("objective/gold")]
    if len(steps) < LEAST_ITERATIONS:
        return
    gold, scores = (_smooth(run.values(f"objective/{n}")) for n in ("gold", "scores"))
    best = max(range(len(gold)), key=gold.__getitem__)
    fall = gold[best] - gold[-1]
    if fall > STANDARD_ERRORS * _error(run.values("objective/gold")) and scores[-1] > scores[0]:
        turned = steps[best]
        yield Finding(
            "ppo",
            "over_optimised",
            "The policy exploits the reward: its score rises while the judge it was not trained "
            f"on falls. It turned at iteration {turned}.",
            f"score {scores[0]:.2f} -> {scores[-1]:.2f}, gold {gold[best]:.3f} in iteration "
            f"{turned} -> {gold[-1]:.3f}",
            f"A higher kl_coef, fewer episodes (stop near iteration {turned}), or a better reward "
            "model.",
            f"a fall by more than {STANDARD_ERRORS:g} standard errors",
        )


def _kl(run: FinishedStage) -> Iterator[Finding]:
    per_token = _kl_per_token(run)
    figure = f"KL to the reference {_ends(run, 'objective/kl')[1]:.2f} nats per completion, "
    figure += f"{per_token:.2f} per token"
    free = run.config.get("kl_coef") == 0
    most = MOST_FREE_KL if free else MOST_KL
    threshold = f"above {most} per token" + " if kl_coef is 0" * free
    if per_token > most and not free and _gold_rose(run):
        told = "The policy is far from the reference, and the judge it was not trained on likes it."
        advice = "Nothing to do as long as gold rises; read the samples."
        yield Finding("ppo", "kl_paid", told, figure, advice, threshold, level="fine")
    elif per_token > most:
        told = "The policy is far from the reference; the reward model has never seen such texts."
        advice = "A higher kl_coef, adaptive_kl_target, or a lower learning_rate."
        yield Finding("ppo", "kl_blow_up", told, figure, advice, threshold)
    elif per_token < LEAST_KL:
        told = (
            "The KL is negative, which a true KL never is: the completions were not sampled from "
            "the distribution that the log-probabilities assume."
        )
        advice = "Check the generation settings and the dropout of the policy."
        threshold = f"below {LEAST_KL} per token"
        yield Finding("ppo", "kl_negative", told, figure, advice, threshold)


def _gold_rose(run: FinishedStage) -> bool:
    """Whether the judge that PPO is not trained on ends near its best, well above its start."""
    values = run.values("objective/gold")
    if len(values) < LEAST_ITERATIONS:
        return False
    gold, least = _smooth(values), STANDARD_ERRORS * _error(values) + 1e-9  # rounding
    return gold[-1] > gold[0] + least and gold[-1] >= max(gold) - least


def _entropy(run: FinishedStage) -> Iterator[Finding]:
    was, entropy = _ends(run, "policy/entropy")
    if entropy < LEAST_ENTROPY * was:
        told = "The policy hardly varies any more: one prompt, one completion."
        figure = f"entropy {was:.2f} -> {entropy:.2f} nats per token"
        advice = "A higher kl_coef, a lower learning_rate, or fewer episodes."
        threshold = f"below {LEAST_ENTROPY:.0%} of what it was"
        yield Finding("ppo", "entropy_collapse", told, figure, advice, threshold)


def _length(run: FinishedStage) -> Iterator[Finding]:
    was, length = _ends(run, "objective/length")
    if not 1 / MOST_LENGTH <= length / was <= MOST_LENGTH:
        yield Finding(
            "ppo",
            "length_drift",
            f"Completions have become much {'longer' if length > was else 'shorter'}: the reward "
            "may pay for length itself.",
            f"{was:.1f} -> {length:.1f} tokens",
            "Look at score against length in the reward model's figure; use a length penalty "
            "(docs/rewards.md) or a higher kl_coef.",
            f"{MOST_LENGTH} times as long, or as short",
        )


def _ended(run: FinishedStage) -> Iterator[Finding]:
    was, ended = _ends(run, "objective/ended")
    # The continuation of an opening is cut at a length; it has no end of its own.
    if ended < LEAST_ENDED and not run.config.get("opening_length"):
        yield Finding(
            "ppo",
            "missing_eos",
            "Many completions do not end: they are cut at response_length.",
            f"ended {was:.0%} -> {ended:.0%}",
            "Set missing_eos_penalty, or raise response_length; if the SFT policy does not end "
            "either, its demonstrations lack the EOS token, or another token ends its turns (the "
            "option eos_token of sft).",
            f"below {LEAST_ENDED:.0%}",
        )


def _value(run: FinishedStage) -> Iterator[Finding]:
    explained = run.values("val/explained_variance")
    late = statistics.fmean(explained[len(explained) // 2 :])
    if late < LEAST_EXPLAINED:
        yield Finding(
            "ppo",
            "value_useless",
            "The value function explains almost none of the returns, so the advantages are as "
            "noisy as without it.",
            f"explained variance {late:.2f} in the second half",
            "A higher value_learning_rate or vf_coef, or more num_ppo_epochs"
            + (
                "; the value function starts from the reward model already."
                if _value_from_reward(run)
                else ", or a value function that starts from a reward model (value_model_path)."
            ),
            f"below {LEAST_EXPLAINED}",
        )


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
    if clipped > MOST_CLIPPED:
        yield Finding(
            "ppo",
            "clipped_much",
            "The optimizer's steps are too large: much of each batch is clipped and has no effect.",
            f"{clipped:.0%} of the tokens clipped",
            "A lower learning_rate, fewer num_ppo_epochs, or target_kl.",
            f"above {MOST_CLIPPED:.0%}",
        )
    elif clipped == 0 and abs(moved) < LEAST_MOVED:
        told = "The policy has hardly changed."
        figure = f"no token ever clipped, KL to the reference {moved:.4f} nats per token"
        advice = "A higher learning_rate, more episodes, or a lower kl_coef."
        threshold = f"none clipped and below {LEAST_MOVED} per token"
        yield Finding("ppo", "hardly_moved", told, figure, advice, threshold)


def _episodes(run: FinishedStage) -> Iterator[Finding]:
    curve = run.curve("objective/rlhf_reward")
    rewards, iterations = [reward for _, reward in curve], curve[-1][0]
    fifth = len(rewards) // 5
    if iterations >= LEAST_ITERATIONS > len(rewards):
        return  # too few logs to tell
    if iterations >= LEAST_ITERATIONS:
        late, before = rewards[-fifth:], rewards[-2 * fifth : -fifth]
        rise = statistics.fmean(late) - statistics.fmean(before)
        gain = statistics.fmean(late) - statistics.fmean(rewards[:fifth])
        if rise <= max(STILL_RISING * gain, STANDARD_ERRORS * _error(rewards)):
            return
        figure = f"{rise:.2f} of {gain:.2f} gained in the last fifth of the iterations"
    else:
        figure = f"{iterations} iterations"
    told = "PPO was stopped too early: there is more to gain."
    advice = "A higher total_episodes (or num_train_epochs)."
    threshold = (
        f"fewer than {LEAST_ITERATIONS} iterations, or more than {STILL_RISING:.0%} of the gain in "
        "the last fifth"
    )
    yield Finding("ppo", "too_few_episodes", told, figure, advice, threshold)


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
    """Trailing mean over a sixth of the curve (at least 3 points, fewer at its start).

    >>> _smooth([0.0, 3.0, 6.0, 9.0])
    [0.0, 1.5, 3.0, 6.0]
    """
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
