"""Findings of SFT and the reward model: their measurements against thresholds."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trl_instruct.diagnosis.finding import LIMITS, Finding, found
from trl_instruct.intervals import show_metric
from trl_instruct.recipes.chain import FinishedStage

SFT, RM = LIMITS["sft"], LIMITS["rm"]


def diagnose_sft(run: FinishedStage) -> Iterator[Finding]:
    before, after = run.metrics.get("base_loss"), run.metrics.get("eval_loss")
    if before is None or after is None:
        yield found("sft", "sft_unmeasured")
        return
    losses = run.values("eval_loss")
    lowest = min([after, *losses])
    still_falling = len(losses) > 2 and losses[-1] < (1 - SFT.STILL_FALLING) * losses[-2]
    measured = {"before": before, "after": after, "lowest": lowest}
    if after > before or after > (1 + SFT.MOST_SFT_RISE) * lowest:
        yield found("sft", "sft_overtrained", **measured)
    elif after > (1 - SFT.LEAST_SFT_GAIN) * before or still_falling:
        yield found("sft", "sft_undertrained", **measured)


def diagnose_rm(run: FinishedStage) -> Iterator[Finding]:
    metrics = run.metrics
    if "accuracy" not in metrics:
        yield found("rm", "rm_unmeasured")
        return
    yield from _rm_against_baselines(metrics)
    yield from _rm_against_training(metrics)
    yield from _rm_against_ceiling(metrics)


def _rm_against_baselines(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    accuracy = show_metric(metrics, "accuracy")
    if metrics.get("ceiling", 1.0) < 0.5:
        yield found("rm", "labels_reversed", ceiling=metrics["ceiling"])
    if metrics["accuracy_high"] < 0.5:
        yield found("rm", "rm_reversed", accuracy=accuracy)
    elif _is_open(metrics):
        yield found("rm", "rm_too_few", accuracy=accuracy)
    elif metrics["accuracy_low"] <= 0.5:
        yield found("rm", "rm_at_chance", accuracy=accuracy)
    else:
        yield from _rm_against_length(metrics)


def _is_open(metrics: Mapping[str, Any]) -> bool:
    return metrics["accuracy_high"] - metrics["accuracy_low"] > RM.WIDE


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


def _rm_against_training(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    if metrics.get("train_accuracy") is None or metrics["accuracy_high"] < 0.5:
        return  # not measured, or reversed, where the gap says nothing
    gap = metrics["train_accuracy"] - metrics["accuracy"]
    if gap > RM.MOST_OVERFIT and metrics["train_accuracy"] > metrics["accuracy_high"]:
        both = {"trained": metrics["train_accuracy"], "held_out": metrics["accuracy"]}
        yield found("rm", "rm_overfitted", **both)


def _rm_against_ceiling(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    limit, named = metrics.get("ceiling"), "noise ceiling"
    if limit is None and "agreement" in metrics:
        limit, named = metrics["agreement"]["mean"], "labeler agreement"
    if limit is None or limit < 0.5 or _is_open(metrics):
        return
    measured = {"accuracy": show_metric(metrics, "accuracy"), "named": named, "limit": limit}
    if metrics["accuracy_high"] >= limit - RM.AT_CEILING:
        yield found("rm", "rm_at_ceiling", **measured)
    elif metrics["accuracy_high"] < limit - RM.BELOW_CEILING:
        yield found("rm", "rm_undertrained", **measured)
