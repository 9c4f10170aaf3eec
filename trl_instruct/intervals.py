"""Means and shares with their 95 % intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Z_95 = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of n independent measurements with Student's 95 % interval, mean +- t sd / sqrt(n)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def share_interval(
    values: Tensor, groups: Tensor | None = None, weights: Tensor | None = None
) -> Interval:
    """Weighted mean of values in [0, 1] with a 95 % interval inside [0, 1], never of zero width.

    Wilson's interval (1927) for a share p of n independent values. Pairs of one prompt (a group)
    share responses, so n is the effective number (Korn & Graubard 1998), p (1 - p) / v, with v the
    linearised variance of a ratio over groups. Few groups say little about v: it is multiplied by
    c(groups) / c(values), c(k) = t^2 k / (k - 1) at k - 1 degrees of freedom. With one 0 or 1 per
    group, n is their number. A v below that of independent 0s and 1s (ties, luck) is drawn towards
    it, as by one more group. If all values are 0, or all are 1, a group counts as one value. With
    fewer than two groups, low and high are NaN.

    Values, weights (None: all 1) and numbers of their groups (None: all differ) are `(N,)`.

    >>> [round(number, 2) for number in share_interval(torch.ones(5))]
    [1.0, 0.57, 1.0]
    """
    values = values.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    numbers = torch.arange(len(values)) if groups is None else groups.unique(return_inverse=True)[1]
    sizes = torch.bincount(numbers, weights=weights)
    total = weights.sum().item()
    p = (values * weights).sum().item() / total
    if len(sizes) < 2:
        return Interval(p, math.nan, math.nan)
    few = _correction(_effective(sizes)) / _correction(_effective(weights))
    if p in (0, 1):
        n = _effective(sizes) / few
    else:
        deviations = torch.bincount(numbers, weights=weights * (values - p)) / total
        variance = deviations.square().sum().item()
        independent = p * (1 - p) / _effective(weights)
        drawn = (len(sizes) * variance + independent) / (len(sizes) + 1)
        n = p * (1 - p) / max(variance, drawn) / few
    z2 = Z_95**2 / n
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    low, high = ((p + z2 / 2 + side) / (1 + z2) for side in (-half, half))
    return Interval(p, min(max(low, 0.0), p), max(min(high, 1.0), p))


@lru_cache(maxsize=1024)
def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t with at least one degree of freedom.

    t = sqrt(freedom) tan(a), with the density of a proportional to cos(a)^(freedom - 1).
    """
    freedom = min(freedom, 10_000)  # beyond, t is the normal's to 4 digits
    angles = np.linspace(0, math.pi / 2, 10_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * below[-1], below, angles))


def _effective(weights: Tensor) -> float:
    """Kish's effective number of values with these weights."""
    return (weights.sum().square() / weights.square().sum()).item()


def _correction(count: float) -> float:
    count = max(round(count, 3), 2)
    return t_quantile(count - 1) ** 2 * count / (count - 1)


def show_interval(interval: Mapping[str, float]) -> str:
    """A mean with its interval, as tables show it."""
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def show_metric(metrics: Mapping[str, float], name: str, sign: str = "") -> str:
    """A metric with its interval (`name`, `name_low`, `name_high`), as tables show it."""
    mean, low, high = (f"{metrics[name + end]:{sign}.3f}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def plot_intervals(
    axes: Any, intervals: Mapping[str, Mapping[str, float]], offset: float = 0.0, **look: Any
) -> None:
    """Means with their intervals above their names, or beside that place by the offset."""
    places = [place + offset for place in range(len(intervals))]
    means = [one["mean"] for one in intervals.values()]
    below = [one["mean"] - one["low"] for one in intervals.values()]
    above = [one["high"] - one["mean"] for one in intervals.values()]
    axes.errorbar(places, means, yerr=[below, above], fmt="o", capsize=4, **look)
    axes.set_xticks(range(len(intervals)), list(intervals))
    axes.set_xlim(-0.5, max(len(intervals), 1) - 0.5)
