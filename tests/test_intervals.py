"""Intervals against published values, by hand, and by how often they contain the truth."""

import math
from statistics import fmean

import numpy as np
import pytest
import torch

from trl_instruct.intervals import (
    mean_interval,
    share_interval,
    show_interval,
    show_metric,
    t_quantile,
)

SIZES = [5, 10, 20, 100]


def wilson(p, n):
    """As textbooks write it."""
    z = 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, centre - half, centre + half


def shares(right, wrong):
    return torch.tensor([1.0] * right + [0.0] * wrong)


# ---- means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [
        *((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452)),
        *((120, 1.9799), (1000, 1.9623), (10**9, 1.9600)),
    ],
)
def test_t_quantiles_are_those_of_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=4e-4)


def test_the_interval_of_a_mean_is_students():
    interval = mean_interval([1.0, 2.0, 3.0, 6.0])  # variance 14 / 3
    half = 3.182446 * math.sqrt(14 / 3 / 4)
    assert interval == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    alone = mean_interval([5.0])
    assert alone.mean == 5.0
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [None, 8])  # normal; gamma, of skewness 0.7
def test_intervals_of_means_hold_the_mean_95_times_in_100(size, shape):
    random = np.random.default_rng(size)
    shape_of = random.normal if shape is None else lambda size: random.gamma(shape, size=size)
    found = [mean_interval(values) for values in shape_of(size=(2000, size)).tolist()]
    assert 0.93 <= fmean(one.low <= (shape or 0) <= one.high for one in found) <= 0.97


# ---- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "size", "low", "high"),
    [
        *((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)),
        *((0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, size, low, high):
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, table I."""
    interval = share_interval(shares(right, size - right))
    assert interval == pytest.approx((right / size, low, high), abs=5e-5)
    mirrored = share_interval(shares(size - right, right))
    assert mirrored == pytest.approx((1 - right / size, 1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("size", SIZES)
def test_intervals_of_shares_hold_the_share_95_times_in_100(size):
    """Exactly, from the binomial. A count is discrete, so that no interval does for every share:
    on average over all shares it does, and hardly below for one of them."""
    found = [share_interval(shares(right, size - right)) for right in range(size + 1)]

    def coverage(p):
        chances = (math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1))
        return sum(
            chance * (i.low <= p <= i.high) for chance, i in zip(chances, found, strict=True)
        )

    assert 0.95 <= fmean(coverage(p) for p in np.linspace(0.03, 0.97, 189)) <= 0.957
    at = [coverage(p) for p in (0.5, 0.8, 0.97)]
    assert min(at) >= {5: 0.858, 10: 0.96}.get(size, 0.94)  # 0.97^5 = 0.859: only 5 of 5 hold 0.97
    assert max(at) <= 0.98


def test_shares_of_equal_values_have_an_interval():
    """The share 0.97 of 5 gives five ones in 86 of 100 samples."""
    assert share_interval(shares(5, 0)) == pytest.approx(wilson(1, 5))
    assert share_interval(shares(0, 5)) == pytest.approx(wilson(0, 5))
    pairs = torch.arange(5).repeat_interleave(6)
    # All of five groups are right: five measurements, of which each has six values.
    c = [2.776445**2 * 5 / 4, 2.045230**2 * 30 / 29]
    assert share_interval(torch.ones(30), pairs) == pytest.approx(wilson(1, 5 * c[1] / c[0]))
    for values, groups in (
        (torch.full((10,), 0.5), None),  # ties
        (shares(2, 1).repeat(5), torch.arange(5).repeat_interleave(3)),  # groups alike
        (torch.full((7,), 1.0), torch.tensor([0, 0, 1, 1, 1, 1, 1])),
    ):
        mean, low, high = share_interval(values, groups)
        assert 0 <= low <= mean <= high <= 1
        assert high - low > 0.05


@pytest.mark.parametrize("wins_and_ties", [(0.25, 0.5), (0.4, 0.5), (0.1, 0.8)])
def test_ties_narrow_the_interval(wins_and_ties):
    won, tied = wins_and_ties
    values = torch.tensor([1.0] * int(100 * won) + [0.5] * int(100 * tied))
    values = torch.cat([values, torch.zeros(100 - len(values))])
    mean, low, high = share_interval(values)
    plain = wilson(mean, 100)
    assert plain[1] < low < mean < high < plain[2]
    # Close to the interval of their own variance.
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 10, rel=0.03)


# ---- groups --------------------------------------------------------------------------------------


def test_one_value_a_group_gives_the_interval_of_independent_values():
    values = torch.tensor([1.0, 0.0, 0.5])
    interval = share_interval(values, torch.tensor([5, 0, 2]))
    assert interval == pytest.approx(share_interval(values))


def test_the_values_of_a_group_are_one_measurement():
    """Four groups of three equal values, three of them right: n = 4 c(12) / c(4)."""
    values, groups = shares(9, 3), torch.arange(4).repeat_interleave(3)
    n = 4 * (2.200985**2 * 12 / 11) / (3.182446**2 * 4 / 3)
    assert share_interval(values, groups) == pytest.approx(wilson(0.75, n))
    alone = share_interval(values, torch.zeros(12))
    assert alone.mean == 0.75
    assert math.isnan(alone.low)


def test_unequal_groups_by_hand():
    """10 groups: five have 2 of 2, five have 1 of 3. Of 25 values 15 are right."""
    values = torch.cat([shares(2, 0).repeat(5), shares(1, 2).repeat(5)])
    groups = torch.cat(
        [torch.arange(5).repeat_interleave(2), torch.arange(5, 10).repeat_interleave(3)]
    )
    variance = 5 * ((2 - 2 * 0.6) ** 2 + (1 - 3 * 0.6) ** 2) / 25**2  # 0.01024 > 0.24 / 25
    effective = 25**2 / (5 * (4 + 9))
    c = [t_quantile(k - 1) ** 2 * k / (k - 1) for k in (round(effective, 3), 25)]
    n = 0.24 / variance * c[1] / c[0]
    assert share_interval(values, groups) == pytest.approx(wilson(0.6, n))


def test_weights_count_relative_to_each_other():
    """A weight of 2 moves the mean as two values do, but it is not two measurements."""
    values, groups = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 1, 2])
    weights = torch.tensor([2.0, 1.0, 1.0])
    weighted = share_interval(values, groups, weights)
    assert weighted == pytest.approx(share_interval(values, groups, 10 * weights))
    assert weighted.mean == pytest.approx(0.75)
    assert weighted.low < share_interval(shares(3, 1)).low


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_intervals_of_rankings_hold_the_accuracy_95_times_in_100(size):
    """Six pairs of four responses each, scored with correlation 0.5: 1/2 + asin(0.5) / pi right.
    With five prompts the interval is too wide rather than too narrow."""
    random, hits = np.random.default_rng(size), []
    first, second = np.triu_indices(4, 1)
    groups = torch.arange(size).repeat_interleave(6)
    for _ in range(600):
        value = random.normal(size=(size, 4))
        score = value / 2 + math.sqrt(3 / 4) * random.normal(size=(size, 4))
        above = [(one[:, first] > one[:, second]) for one in (value, score)]
        right = torch.from_numpy(above[0] == above[1]).flatten()
        interval = share_interval(right, groups)
        hits.append(interval.low <= 2 / 3 <= interval.high)
    assert 0.93 <= fmean(hits) <= (0.98 if size == 5 else 0.97)


def test_intervals_as_tables_show_them():
    assert show_interval({"mean": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    gain = {"gain": 0.5, "gain_low": 0.25, "gain_high": 0.75}
    assert show_metric(gain, "gain", sign="+") == "+0.500 [+0.250, +0.750]"


def test_students_interval_by_hand():
    assert [round(number, 2) for number in mean_interval([0.0, 1.0])] == [0.5, -5.85, 6.85]
    assert [round(t_quantile(freedom), 3) for freedom in (1, 4, 19)] == [12.706, 2.776, 2.093]
