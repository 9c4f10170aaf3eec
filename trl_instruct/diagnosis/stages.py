"""Findings of SFT and the reward model: their measurements against thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from trl_instruct.intervals import show_metric
from trl_instruct.recipes.chain import FinishedStage

# SFT, on held-out demonstrations.
LEAST_SFT_GAIN = 0.02  # share of the base model's loss
STILL_FALLING = 0.05  # relative fall of the loss at the last evaluation
MOST_SFT_RISE = 0.10  # above its lowest loss, as a share

# Reward model, on held-out pairs.
MUCH_LENGTH, MOST_LENGTH = 0.6, 0.7  # absolute correlation of score and length within a prompt
WIDE = 0.20  # an interval of the accuracy that leaves the verdict open
MOST_OVERFIT = 0.10  # accuracy on training pairs minus accuracy on held-out pairs
AT_CEILING, BELOW_CEILING = 0.03, 0.10  # below the labelers' noise ceiling or agreement


def diagnose_sft(run: FinishedStage) -> Iterator[Finding]:
    before, after = run.metrics.get("base_loss"), run.metrics.get("eval_loss")
    if before is None or after is None:
        told = "It is not known whether SFT trained the policy too little or too much."
        figure = "no loss on held-out demonstrations"
        advice = "Give sft an eval_dataset_name."
        yield Finding("sft", "sft_unmeasured", told, figure, advice, level="unknown")
        return
    losses = run.values("eval_loss")
    lowest = min([after, *losses])
    still_falling = len(losses) > 2 and losses[-1] < (1 - STILL_FALLING) * losses[-2]
    figure = f"held-out loss {before:.3f} -> {after:.3f} (lowest {lowest:.3f}) nats per token"
    if after > before or after > (1 + MOST_SFT_RISE) * lowest:
        yield Finding(
            "sft",
            "sft_overtrained",
            "SFT trained too long or at too high a learning rate: the policy has become worse on "
            "demonstrations it has not seen.",
            figure,
            "Fewer num_train_epochs, a lower learning_rate, or more demonstrations. (The paper "
            "trains past the lowest loss and chooses the checkpoint by reward-model score, C.1.)",
            f"above the base model's, or {MOST_SFT_RISE:.0%} above its lowest",
        )
    elif after > (1 - LEAST_SFT_GAIN) * before or still_falling:
        told = "SFT trained too little: the policy has not learnt the demonstrations."
        advice = "More num_train_epochs or a higher learning_rate."
        threshold = (
            f"less than {LEAST_SFT_GAIN:.0%} below the base model's, or still falling by more than "
            f"{STILL_FALLING:.0%} from one evaluation to the next"
        )
        yield Finding("sft", "sft_undertrained", told, figure, advice, threshold)


def diagnose_rm(run: FinishedStage) -> Iterator[Finding]:
    metrics = run.metrics
    if "accuracy" not in metrics:
        told = "It is not known how well the reward model agrees with the labelers."
        figure = "no held-out rankings"
        advice = "Set eval_size, or give rm an eval_dataset_name."
        yield Finding("rm", "rm_unmeasured", told, figure, advice, level="unknown")
        return
    yield from _rm_against_baselines(metrics)
    yield from _rm_against_training(metrics)
    yield from _rm_against_ceiling(metrics)


def _rm_against_baselines(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    accuracy = f"held-out accuracy {show_metric(metrics, 'accuracy')}"
    flipped = "Check the order: rank 1 is the best; with scores or ratings, the highest is."
    if metrics.get("ceiling", 1.0) < 0.5:
        told = "The rankings contradict the scores they were made from: they seem to be reversed."
        figure = (
            f"the labelers' own scores agree with {metrics['ceiling']:.3f} of their comparisons"
        )
        threshold = "below 0.5"
        yield Finding("rm", "labels_reversed", told, figure, flipped, threshold)
    if metrics["accuracy_high"] < 0.5:
        told = (
            "The reward model prefers what the labelers reject: the training or held-out rankings "
            "seem to be reversed."
        )
        threshold = "the whole interval is below 0.5"
        yield Finding("rm", "rm_reversed", told, accuracy, flipped, threshold)
    elif _is_open(metrics):
        told = "The held-out comparisons are too few to tell how good the reward model is."
        advice = "Hold out more prompts (eval_size)."
        threshold = f"the interval is wider than {WIDE}"
        yield Finding("rm", "rm_too_few", told, accuracy, advice, threshold, level="unknown")
    elif metrics["accuracy_low"] <= 0.5:
        told = "The reward model is no better than chance."
        advice = "More rankings, a higher learning_rate, or a better model to start from."
        threshold = "the interval contains 0.5"
        yield Finding("rm", "rm_at_chance", told, accuracy, advice, threshold)
    else:
        yield from _rm_against_length(metrics)


def _is_open(metrics: Mapping[str, Any]) -> bool:
    return metrics["accuracy_high"] - metrics["accuracy_low"] > WIDE


def _rm_against_length(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    longer = metrics["length_accuracy"] >= 0.5
    gain, low = metrics["above_length"], metrics["above_length_low"]
    if not longer:  # then the shorter answer wins more often
        gain = metrics["accuracy"] - (1 - metrics["length_accuracy"])
        halves = (metrics[n] - metrics[f"{n}_low"] for n in ("accuracy", "length_accuracy"))
        low = gain - math.hypot(*halves)
    correlation = metrics["length_correlation"] or 0.0  # null if lengths never differ
    figure = (
        f"{gain:+.3f} more accurate than 'the {'longer' if longer else 'shorter'} answer wins' "
        f"(at least {low:+.3f}, 95 %); correlation of score and length {correlation:+.2f}"
    )
    if low <= 0 or abs(correlation) > MOST_LENGTH:
        yield Finding(
            "rm",
            "rm_is_length",
            "The reward model judges by the length of an answer: PPO would learn little else.",
            figure,
            "Rank more answers, or answers of similar length; see the figure of score and length.",
            f"the interval contains 0, or the correlation within a prompt is beyond {MOST_LENGTH}",
        )
    elif abs(correlation) > MUCH_LENGTH:
        told = "The score follows the length of an answer, but knows more than that."
        advice = "Watch objective/length in PPO; a length penalty is in docs/rewards.md."
        threshold = f"the correlation within a prompt is beyond {MUCH_LENGTH}"
        yield Finding("rm", "rm_follows_length", told, figure, advice, threshold, level="fine")


def _rm_against_training(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    if metrics.get("train_accuracy") is None or metrics["accuracy_high"] < 0.5:
        return  # not measured, or reversed, where the gap says nothing
    gap = metrics["train_accuracy"] - metrics["accuracy"]
    if gap > MOST_OVERFIT and metrics["train_accuracy"] > metrics["accuracy_high"]:
        yield Finding(
            "rm",
            "rm_overfitted",
            "The reward model has memorised its training rankings, the labelers' noise included.",
            f"accuracy {metrics['train_accuracy']:.3f} in training, {metrics['accuracy']:.3f} "
            "held out",
            "One epoch (C.2), a lower learning_rate, or more prompts.",
            f"a gap above {MOST_OVERFIT}, and the training's is above the interval",
        )


def _rm_against_ceiling(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    limit, named = metrics.get("ceiling"), "noise ceiling"
    if limit is None and "agreement" in metrics:
        limit, named = metrics["agreement"]["mean"], "labeler agreement"
    if limit is None or limit < 0.5 or _is_open(metrics):
        return
    figure = f"held-out accuracy {show_metric(metrics, 'accuracy')}; {named}: {limit:.3f}"
    if metrics["accuracy_high"] >= limit - AT_CEILING:
        told = "The reward model is about as accurate as these rankings allow."
        advice = "Nothing to do: more training would not help, only labelers who agree more."
        threshold = f"the interval reaches to within {AT_CEILING} of it"
        yield Finding("rm", "rm_at_ceiling", told, figure, advice, threshold, level="fine")
    elif metrics["accuracy_high"] < limit - BELOW_CEILING:
        told = "The reward model has not learnt all that the rankings teach."
        advice = "More rankings, a higher learning_rate, or a better model to start from."
        threshold = f"the whole interval is more than {BELOW_CEILING} below it"
        yield Finding("rm", "rm_undertrained", told, figure, advice, threshold)


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
