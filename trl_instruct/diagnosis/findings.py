"""Findings about the stages: their measurements against thresholds; words are in findings.yaml."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import yaml

from trl_instruct.ppo_trainer.roles import FROM_POLICY, VALUE_HEAD
from trl_instruct.recipes.chain import FinishedStage
from trl_instruct.rewards.load import is_address, is_python

WORDS = yaml.safe_load(Path(__file__).with_name("findings.yaml").read_text(encoding="utf-8"))
# Thresholds of each stage by name.
LIMITS = {stage: SimpleNamespace(**limits) for stage, limits in WORDS.pop("limits").items()}
SFT, RM, PPO = (LIMITS[stage] for stage in ("sft", "rm", "ppo"))


class Finding(NamedTuple):
    """One finding about a stage.

    told: the finding; figure: the evidence; advice: what to do; threshold: what the figure was
    compared with. level: "fault", "fine" (worth knowing), or "unknown" (it was not measured).
    """

    stage: str
    name: str
    told: str
    figure: str
    advice: str
    threshold: str = ""
    level: Literal["fault", "fine", "unknown"] = "fault"


def found(stage: str, name: str, /, **given: Any) -> Finding:
    """The finding of that name, its words filled with the thresholds and what was measured."""
    given |= vars(LIMITS[stage])
    return Finding(stage, name, **{k: v.format(**given) for k, v in WORDS[stage][name].items()})


def diagnose(chain: Mapping[str, FinishedStage]) -> list[Finding]:
    """The findings for each stage in a chain, from its own measurements, in the order they ran."""
    checks = {"sft": diagnose_sft, "rm": diagnose_rm, "ppo": diagnose_ppo}
    words = WORDS["any"]["stage_missing"]
    gaps = [(name, gap) for name, run in chain.items() for gap in run.gaps]
    missing = [Finding(name, "stage_missing", figure=gap, **words) for name, gap in gaps]
    return missing + [f for name in checks if name in chain for f in checks[name](chain[name])]


def verdict(findings: Sequence[Finding]) -> str:
    """The findings in one sentence: the first stage at fault affects those after it."""
    faulty = [finding.stage for finding in findings if finding.level == "fault"]
    if not faulty:
        return "No fault found."
    count = "1 fault" if len(faulty) == 1 else f"{len(faulty)} faults"
    later = "" if faulty[0] == "ppo" else ": its faults affect the stages after it"
    return f"{count} found. Begin with {faulty[0]}{later}."


def diagnose_sft(run: FinishedStage) -> Iterator[Finding]:
    before, after = run.metrics.get("base_loss"), run.metrics.get("eval_loss")
    if before is None or after is None:
        yield found("sft", "sft_unmeasured")
        return
    losses = run.values("eval_loss")
    lowest = min([after, *losses])
    still_falling = len(losses) > 2 and losses[-1] < (1 - SFT.STILL_FALLING) * losses[-2]
    if after > before or after > (1 + SFT.MOST_SFT_RISE) * lowest:
        yield found("sft", "sft_overtrained", lowest=lowest, **run.metrics)
    elif after > (1 - SFT.LEAST_SFT_GAIN) * before or still_falling:
        yield found("sft", "sft_undertrained", lowest=lowest, **run.metrics)


def diagnose_rm(run: FinishedStage) -> Iterator[Finding]:
    metrics = run.metrics
    if "accuracy" not in metrics:
        yield found("rm", "rm_unmeasured")
        return
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    if metrics.get("ceiling", 1.0) < 0.5:
        yield found("rm", "labels_reversed", **metrics)
    if high < 0.5:
        yield found("rm", "rm_reversed", **metrics)
    elif high - low > RM.WIDE:
        yield found("rm", "rm_too_few", **metrics)
    elif low <= 0.5:
        yield found("rm", "rm_at_chance", **metrics)
    else:
        yield from _rm_against_length(metrics)
    trained = metrics.get("train_accuracy")
    gap = trained is not None and trained - metrics["accuracy"] > RM.MOST_OVERFIT
    if gap and trained > high >= 0.5:  # of a reversed model the gap says nothing
        yield found("rm", "rm_overfitted", **metrics)
    limit, named = metrics.get("ceiling"), "noise ceiling"
    if limit is None and "agreement" in metrics:
        limit, named = metrics["agreement"]["mean"], "labeler agreement"
    if limit is None or limit < 0.5 or high - low > RM.WIDE:
        return
    measured = {**metrics, "named": named, "limit": limit}
    if high >= limit - RM.AT_CEILING:
        yield found("rm", "rm_at_ceiling", **measured)
    elif high < limit - RM.BELOW_CEILING:
        yield found("rm", "rm_undertrained", **measured)


def _rm_against_length(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    longer = metrics["length_accuracy"] >= 0.5
    gain, low = metrics["above_length"], metrics["above_length_low"]
    if not longer:  # then the shorter answer wins more often
        gain = metrics["accuracy"] - (1 - metrics["length_accuracy"])
        halves = (metrics[n] - metrics[f"{n}_low"] for n in ("accuracy", "length_accuracy"))
        low = gain - math.hypot(*halves)
    correlation = metrics["length_correlation"] or 0.0  # null if lengths never differ
    measured = {"gain": gain, "low": low, "correlation": correlation}
    measured["longer"] = "longer" if longer else "shorter"
    if abs(correlation) > RM.MOST_LENGTH or (low <= 0 and abs(correlation) > RM.MUCH_LENGTH):
        yield found("rm", "rm_is_length", **measured)
    elif low <= 0:
        yield found("rm", "rm_below_length", **measured)
    elif abs(correlation) > RM.MUCH_LENGTH:
        yield found("rm", "rm_follows_length", **measured)


def diagnose_ppo(run: FinishedStage) -> Iterator[Finding]:
    """What the checks find in the metrics that the run has logged (TRL's own trainer lacks some).

    A run that `stop_when_exploited` ended is as long as its result, up to the judge's peak.
    """
    if not run.curve("objective/kl"):
        yield found("ppo", "ppo_unmeasured")
        return
    peak = run.metrics.get("peak_iteration")
    if peak is not None:
        run = run._replace(logs=[log for log in run.logs if log["step"] <= peak])
    for check in (_over_optimisation, _kl, _drifts, _value, _steps):
        yield from check(run)
    if peak is None:  # else it was ended on purpose
        yield from _episodes(run)


def _over_optimisation(run: FinishedStage) -> Iterator[Finding]:
    steps = [step for step, _ in run.curve("objective/gold")]
    if len(steps) < PPO.LEAST_ITERATIONS or not run.curve("objective/scores"):
        return
    gold, scores = (_smooth(run.values(f"objective/{n}")) for n in ("gold", "scores"))
    best = max(range(len(gold)), key=gold.__getitem__)
    fall = gold[best] - gold[-1]
    if fall > PPO.STANDARD_ERRORS * _error(run.values("objective/gold")) and scores[-1] > scores[0]:
        ends = {"scores": (scores[0], scores[-1]), "gold": (gold[best], gold[-1])}
        yield found("ppo", "over_optimised", turned=steps[best], **ends)


def _kl(run: FinishedStage) -> Iterator[Finding]:
    kl, per_token = _ends(run, "objective/kl")[1], _kl_per_token(run)
    free = run.config.get("kl_coef") == 0
    most = PPO.MOST_FREE_KL if free else PPO.MOST_KL
    measured: Any = {"kl": kl, "per_token": per_token, "most": most}
    if per_token > most and not free and _gold_rose(run):
        yield found("ppo", "kl_paid", **measured)
    elif per_token > most:
        yield found("ppo", "kl_blow_up", free=" if kl_coef is 0" * free, **measured)
    elif per_token < PPO.LEAST_KL:
        yield found("ppo", "kl_negative", **measured)


def _gold_rose(run: FinishedStage) -> bool:
    """Whether the judge that PPO is not trained on ends near its best, well above its start."""
    values = run.values("objective/gold")
    if len(values) < PPO.LEAST_ITERATIONS:
        return False
    gold, least = _smooth(values), PPO.STANDARD_ERRORS * _error(values) + 1e-9  # rounding
    return gold[-1] > gold[0] + least and gold[-1] >= max(gold) - least


def _drifts(run: FinishedStage) -> Iterator[Finding]:
    was, now = _ends(run, "policy/entropy")
    if now < PPO.LEAST_ENTROPY * was:
        yield found("ppo", "entropy_collapse", was=was, now=now)
    was, now = _ends(run, "objective/length")
    if now / was > PPO.MOST_LENGTH or now / was < 1 / PPO.MOST_LENGTH:
        longer = "longer" if now > was else "shorter"
        yield found("ppo", "length_drift", was=was, now=now, longer=longer)
    was, now = _ends(run, "objective/ended")
    # The continuation of an opening is cut at a length; it has no end of its own.
    if now < PPO.LEAST_ENDED and not run.config.get("opening_length"):
        yield found("ppo", "missing_eos", was=was, now=now)


def _value(run: FinishedStage) -> Iterator[Finding]:
    explained = run.values("val/explained_variance") or [math.nan]
    late = statistics.fmean(explained[len(explained) // 2 :])
    if late < PPO.LEAST_EXPLAINED:
        start = ", or a value function that starts from a reward model (value_model_path)"
        if _value_from_reward(run):
            start = "; the value function starts from the reward model already"
        yield found("ppo", "value_useless", late=late, or_from_reward=start)


def _value_from_reward(run: FinishedStage) -> bool:
    """Whether the value function started from a reward model, as the config tells."""
    named = run.config.get("value_model_path") or run.config.get("reward_model_path")
    sole = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(sole, str) or sole in (FROM_POLICY, VALUE_HEAD):
        return False
    return not (is_address(sole) or is_python(sole))


def _steps(run: FinishedStage) -> Iterator[Finding]:
    clipped = statistics.fmean(run.values("policy/clipfrac") or [math.nan])
    moved = _kl_per_token(run)
    if clipped > PPO.MOST_CLIPPED:
        yield found("ppo", "clipped_much", clipped=clipped)
    elif clipped == 0 and abs(moved) < PPO.LEAST_MOVED:
        yield found("ppo", "hardly_moved", moved=moved)


def _episodes(run: FinishedStage) -> Iterator[Finding]:
    curve = run.curve("objective/rlhf_reward")
    if not curve:
        return
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
    yield found("ppo", "too_few_episodes", how_far=how_far)


def _kl_per_token(run: FinishedStage) -> float:
    return _ends(run, "objective/kl")[1] / max(_ends(run, "objective/length")[1], 1.0)


def _ends(run: FinishedStage, name: str) -> tuple[float, float]:
    """Means of the first and of the last tenth of a curve; NaN, beyond no threshold, without it."""
    values = run.values(name) or [math.nan]
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def _window(values: Sequence[float]) -> int:
    return max(3, len(values) // 6)


def _smooth(values: Sequence[float]) -> list[float]:
    """Trailing mean over a sixth of the curve (at least 3 points, fewer at its start)."""
    window, ends = _window(values), range(1, len(values) + 1)
    return [statistics.fmean(values[max(0, end - window) : end]) for end in ends]


def _error(values: Sequence[float]) -> float:
    """Standard error of the difference of two smoothed points, from differences of neighbours.

    With noise of variance s^2 per point, neighbours differ with variance 2 s^2, and the means of
    two windows of n points with 2 s^2 / n. A slow trend adds little.
    """
    jumps = [b - a for a, b in pairwise(values)]
    return math.sqrt(statistics.fmean(j * j for j in jumps) / _window(values))
