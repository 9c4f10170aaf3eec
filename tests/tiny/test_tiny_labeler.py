from itertools import combinations

import pytest

from trl_instruct.tiny import SimulatedLabeler


def test_label_is_gold_plus_noise_of_the_given_size():
    noisy = SimulatedLabeler(noise=0.5, seed=3).label([1.0] * 4000)
    mean = sum(noisy) / 4000
    deviation = (sum((score - mean) ** 2 for score in noisy) / 4000) ** 0.5
    assert mean == pytest.approx(1.0, abs=0.04)
    assert deviation == pytest.approx(0.5, abs=0.03)


def test_label_depends_on_seed_and_call_order_alone():
    one, same, other = SimulatedLabeler(seed=1), SimulatedLabeler(seed=1), SimulatedLabeler(seed=2)
    first = one.label([0.5, 0.5])
    assert same.label([0.5, 0.5]) == first
    assert one.label([0.5, 0.5]) != first
    assert other.label([0.5, 0.5]) != first


def test_negative_noise_is_an_error():
    with pytest.raises(ValueError, match="-0.1"):
        SimulatedLabeler(noise=-0.1)


def agreement(gold_scores, noise):
    """How often two labelers put a pair of candidates in the same order."""
    first, second = (SimulatedLabeler(noise, seed=seed) for seed in (0, 1))
    alike = []
    for gold in gold_scores:
        labels = zip(first.label(gold), second.label(gold), strict=True)
        pairs = combinations(labels, 2)
        alike += [(a > c) == (b > d) for (a, b), (c, d) in pairs]
    return sum(alike) / len(alike)


def test_labels_without_noise_are_in_the_order_of_gold():
    assert agreement([[0.0, 0.5, 0.7], [1.0, 0.2]], noise=0.0) == 1.0


def test_agreement_of_coin_tosses_is_a_half():
    assert agreement([[0.5] * 4] * 1000, noise=0.3) == pytest.approx(0.5, abs=0.03)


def test_agreement_by_the_normal_distribution():
    # Each labeler orders a pair with P(N(1, 2) > 0) = 0.7602; alike: p^2 + (1 - p)^2 = 0.6354.
    assert agreement([[1.0, 0.0]] * 20_000, noise=1.0) == pytest.approx(0.6354, abs=0.012)
