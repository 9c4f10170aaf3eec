"""Means with their 95 % intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Z_95 = 1.96


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent measurements with the normal 95 % interval, mean +- 1.96 sd / sqrt(n).

    >>> [round(number, 2) for number in mean_interval([0.0, 1.0])]
    [0.5, -0.48, 1.48]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = Z_95 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def grouped_interval(values: Tensor, groups: Tensor, weights: Tensor | None) -> Interval:
    """Weighted mean with its 95 % interval, of measurements that are correlated within groups.

    Pairs of one prompt share responses, so a prompt is one measurement, weighted by its pairs: the
    linearised variance of a ratio estimator. With one value per group this is `mean_interval`.

    Args:
        values, weights: `(N,)`; weights None: all 1.
        groups: `(N,)` number of each value's group, from 0.
    """
    values = values.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    total = weights.sum()
    mean = (values * weights).sum() / total
    there = groups.unique()
    if len(there) < 2:
        return Interval(mean.item(), math.nan, math.nan)
    deviations = torch.bincount(groups, weights=weights * (values - mean))
    sample = len(there) / (len(there) - 1)
    half = Z_95 * (sample * deviations.square().sum()).sqrt().item() / total.item()
    return Interval(mean.item(), mean.item() - half, mean.item() + half)


def show_interval(interval: Mapping[str, float]) -> str:
    """A mean with its interval, as tables show it.

    >>> show_interval({"mean": 0.5, "low": 0.25, "high": 0.75})
    '0.500 [0.250, 0.750]'
    """
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def show_metric(metrics: Mapping[str, float], name: str, sign: str = "") -> str:
    """A metric with its interval (`name`, `name_low`, `name_high`), as tables show it.

    >>> show_metric({"gain": 0.5, "gain_low": 0.25, "gain_high": 0.75}, "gain", sign="+")
    '+0.500 [+0.250, +0.750]'
    """
    mean, low, high = (f"{metrics[name + end]:{sign}.3f}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"
