"""Held-out evaluation: every number by hand."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_intervals import wilson

from trl_instruct.errors import InputError
from trl_instruct.intervals import t_quantile
from trl_instruct.reward_trainer.evaluation import (
    best_of_k,
    by_dissent,
    calibration,
    calibration_errors,
    comparisons,
    evaluate_reward,
    numbered,
    response_ids,
    within_prompt_correlation,
)
from trl_instruct.reward_trainer.labelers import Labeled, agreement, reliability

SCORES = {"aaa": 2.0, "bb": 1.0, "c": 3.0, "dddd": 1.0}
RANKINGS = [
    {"prompt": "p", "responses": ["aaa", "bb", "c"], "ranks": [1, 2, 3]},
    {"prompt": "q", "responses": ["c", "dddd"], "ranks": [1, 2]},
    {"prompt": "r", "responses": ["aaa", "bb", "dddd"], "ranks": [2, 1, 1]},
]


def judge(prompts, completions):
    return [SCORES[text] for text in completions]


def log_loss(*margins):
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def measure(rows, tokenizer, reward=judge):
    return evaluate_reward(reward, Dataset.from_list(rows), tokenizer).metrics


@pytest.fixture
def measured(tokenizer):
    return measure(RANKINGS, tokenizer)


def test_accuracy_and_log_loss(measured):
    """p: a>b right (+1), a>c wrong (-1), b>c wrong (-2); q: right (+2); r: b>a, d>a wrong (-1)."""
    assert measured["accuracy"] == pytest.approx(2 / 6)
    assert measured["log_loss"] == pytest.approx(log_loss(1, -1, -2, 2, -1, -1))
    sizes = [measured[f"eval_{what}"] for what in ("prompts", "rankings", "pairs")]
    assert sizes == [3, 3, 6]


def test_ranks_with_gaps_lose_no_pair(tokenizer):
    """As when some responses of a ranking are left out: 1 and 6 are further apart than K."""
    rows = [{"prompt": "p", "responses": ["c", "aaa", "bb"], "ranks": [1, 4, 6]}]
    measured = measure(rows, tokenizer)
    assert (measured["eval_pairs"], measured["accuracy"]) == (3, 1.0)
    assert set(measured["by_distance"]) == {"2", "3", "5"}


def test_the_interval_is_over_prompts(measured):
    """Deviations from the mean 1/3 by prompt: 1 - 1, 1 - 1/3, 0 - 2/3."""
    expected = over_three_prompts((0 + 4 / 9 + 4 / 9) / 36)
    found = [measured[f"accuracy{end}"] for end in ("", "_low", "_high")]
    assert found == pytest.approx(expected)


def over_three_prompts(variance):
    """The interval of a third of the six pairs, whose variance is drawn to that of independent
    pairs; the prompts have 3, 1 and 2 of them."""
    variance = (3 * variance + 2 / 9 / 6) / 4
    prompts, pairs = (t_quantile(k - 1) ** 2 * k / (k - 1) for k in (round(36 / 14, 3), 6))
    return wilson(1 / 3, 2 / 9 / variance * pairs / prompts)


def test_the_longer_answer_on_the_same_pairs(measured):
    """p: all three right (3 > 2 > 1 tokens); q: wrong; r: b > a wrong, d > a right."""
    assert measured["length_accuracy"] == pytest.approx(4 / 6)
    assert measured["length_accuracy_low"] < 4 / 6 < measured["length_accuracy_high"]


def test_what_the_scores_add_to_the_length(measured):
    """p: 1 - 3, q: 1 - 0, r: 0 - 1 right; a mean of -2/6, so deviations -1, 4/3, -1/3 by prompt,
    half of that for the share (1 + difference) / 2, whose mean is 1/3."""
    share = over_three_prompts((1 + 16 / 9 + 1 / 9) / 4 / 36)
    added = [measured[f"above_length{end}"] for end in ("", "_low", "_high")]
    assert added == pytest.approx([2 * end - 1 for end in share])


def test_ties_of_score_and_length_count_one_half(tokenizer):
    rows = [{"prompt": "p", "responses": ["dddd", "bb"], "ranks": [1, 2]}]
    assert measure(rows, tokenizer)["accuracy"] == 0.5
    rows = [{"prompt": "p", "responses": ["x", "y"], "ranks": [1, 2]}]
    constant = measure(rows, tokenizer, lambda prompts, completions: [0.0] * len(completions))
    assert (constant["accuracy"], constant["length_accuracy"]) == (0.5, 0.5)
    assert constant["log_loss"] == pytest.approx(math.log(2))


def test_best_of_k(measured, tokenizer):
    """p: c, on top, is last; q: c is first; r: aaa, on top, is second to two that tie."""
    assert measured["best_of_k"] == pytest.approx(1 / 3)
    assert measured["best_of_k_chance"] == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3)
    expected = wilson(1 / 3, 3)
    found = [measured[f"best_of_k{end}"] for end in ("", "_low", "_high")]
    assert found == pytest.approx(expected)
    rows = [{**row, "weight": weight} for row, weight in zip(RANKINGS, (1, 4, 2), strict=True)]
    weighted = measure(rows, tokenizer)
    assert weighted["best_of_k"] == pytest.approx(4 / 7)
    assert weighted["best_of_k_chance"] == pytest.approx((1 / 3 + 4 / 2 + 2 * 2 / 3) / 7)


def test_best_of_k_where_several_are_first_or_on_top():
    def rate(ranks, scores):
        ranking = Labeled(0, list(range(len(ranks))), ranks, 1.0, None, None)
        tied = Labeled(1, [0, 1], [1, 1], 9.0, None, None)  # no winner: says nothing
        found = best_of_k([ranking, tied], scores)
        return found["best_of_k"], found["best_of_k_chance"]

    assert rate([1, 1, 2], [0.0, 3.0, 1.0]) == (1.0, pytest.approx(2 / 3))
    assert rate([1, 2, 3], [3.0, 3.0, 3.0]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert rate([2, 1, 3], [1.0, 1.0, 0.0]) == (0.5, pytest.approx(1 / 3))


def test_by_size_and_by_distance(measured):
    by_k = {k: (cell["accuracy"], cell["pairs"]) for k, cell in measured["by_k"].items()}
    assert by_k == {"2": (1.0, 1), "3": (pytest.approx(1 / 5), 5)}
    cells = measured["by_distance"]
    assert {k: cell["pairs"] for k, cell in cells.items()} == {"1": 5, "2": 1}
    assert (cells["1"]["accuracy"], cells["2"]["accuracy"]) == (pytest.approx(2 / 5), 0.0)
    assert cells["1"]["length_accuracy"] == pytest.approx(3 / 5)
    assert measured["by_k"]["3"]["length_accuracy"] == pytest.approx(4 / 5)


def test_the_order_of_responses_does_not_matter(measured, tokenizer):
    turned = [{**row, **{f: row[f][::-1] for f in ("responses", "ranks")}} for row in RANKINGS]
    again = measure(turned, tokenizer)
    for name in ("accuracy", "accuracy_low", "log_loss", "length_accuracy", "length_correlation"):
        assert again[name] == pytest.approx(measured[name])


def test_a_response_is_scored_once_however_often_it_is_ranked(tokenizer):
    asked = []

    def reward(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return judge(prompts, completions)

    both = [
        {**RANKINGS[0], "labeler": "x"},
        {"prompt": "p", "responses": ["c", "aaa", "dddd"], "ranks": [1, 2, 3], "labeler": "y"},
    ]
    result = evaluate_reward(reward, Dataset.from_list(both), tokenizer)
    assert asked == [("p", "aaa"), ("p", "bb"), ("p", "c"), ("p", "dddd")]
    assert result.scores == [2.0, 1.0, 3.0, 1.0]
    assert result.lengths == [3, 2, 1, 4]
    assert result.metrics["eval_prompts"] == 1


def test_a_ranking_counts_with_its_weight(tokenizer):
    rows = [{**row, "weight": weight} for row, weight in zip(RANKINGS, (1, 4, None), strict=True)]
    weighted = measure(rows, tokenizer)
    assert weighted["accuracy"] == pytest.approx((1 + 4) / (3 + 4 + 2))
    expected = (log_loss(1, -1, -2) * 3 + log_loss(2) * 4 + log_loss(-1) * 2) / 9
    assert weighted["log_loss"] == pytest.approx(expected)


def test_nothing_to_compare(tokenizer):
    rows = [{"prompt": "p", "responses": ["aaa", "bb"], "ranks": [1, 1]}]
    with pytest.raises(InputError, match="has a pair with a winner"):
        measure(rows, tokenizer)


# ---- calibration ---------------------------------------------------------------------------------


def pairs_of(margins, weights=None):
    """One ranking of K = 2 a margin, each of its own prompt."""
    scores = [score for margin in margins for score in (margin, 0.0)]
    rows = [
        {"prompt": f"p{i}", "responses": [f"a{i}", f"b{i}"], "ranks": [1, 2]}
        for i in range(len(margins))
    ]
    for row, weight in zip(rows, weights or (), strict=bool(weights)):
        row["weight"] = weight
    labeled = numbered(Dataset.from_list(rows)).rankings
    return comparisons(labeled, scores, [1] * len(scores))


def test_calibration_compares_what_is_expected_with_what_is_observed():
    """30 pairs at |margin| 0.1, 20 of them right, and 30 at 2, 27 of them right: two bins."""
    margins = [2.0] * 27 + [-2.0] * 3 + [0.1] * 20 + [-0.1] * 10
    near, far = calibration(pairs_of(margins))
    sure = [1 / (1 + math.exp(-margin)) for margin in (0.1, 2.0)]
    assert (near["expected"], far["expected"]) == pytest.approx(sure)
    assert (near["observed"], far["observed"]) == pytest.approx((20 / 30, 27 / 30))
    assert (near["pairs"], far["pairs"]) == (30, 30)
    assert (near["low"], near["high"]) == pytest.approx(wilson(20 / 30, 30)[1:])
    error = (abs(20 / 30 - sure[0]) + abs(27 / 30 - sure[1])) / 2
    assert calibration_errors(pairs_of(margins))["calibration_error"] == pytest.approx(error)


def test_a_calibrated_model_has_no_error():
    margin = math.log(3)  # sigmoid 0.75
    pairs = pairs_of([margin] * 30 + [-margin] * 10)
    assert calibration_errors(pairs)["calibration_error"] < 1e-9


def test_the_floor_counts_the_weights():
    """One bin, weights of 3 and 1, 0.6 expected: of both right the error is 0.4, of the heavy one
    0.15, of the light one 0.35, of none 0.6."""
    floor = 0.36 * 0.4 + 0.24 * 0.15 + 0.24 * 0.35 + 0.16 * 0.6
    errors = calibration_errors(pairs_of([math.log(1.5), -math.log(1.5)], weights=[3.0, 1.0]))
    assert errors["calibration_error"] == pytest.approx(0.15)
    assert errors["calibration_floor"] == pytest.approx(floor, abs=0.03)


def test_the_floor_is_what_a_perfect_model_gets_on_60_pairs():
    """Two bins of 30: the mean of |k / 30 - p| from the binomial."""
    margins = [0.1] * 30 + [2.0] * 30
    floor = 0.0
    for p in (1 / (1 + math.exp(-margin)) for margin in (0.1, 2.0)):
        chances = [math.comb(30, k) * p**k * (1 - p) ** (30 - k) for k in range(31)]
        floor += sum(chance * abs(k / 30 - p) for k, chance in enumerate(chances)) / 2
    assert floor == pytest.approx(0.061, abs=1e-3)
    errors = calibration_errors(pairs_of(margins))
    assert errors["calibration_floor"] == pytest.approx(floor, abs=0.006)
    assert errors["calibration_floor"] < errors["calibration_floor_high"] < 2.5 * floor
    assert calibration_errors(pairs_of(margins)) == errors


@pytest.mark.slow
def test_the_floor_knows_that_pairs_of_a_ranking_depend_on_each_other():
    """10 rankings of nine, drawn one after the other from the best (Plackett-Luce): 360 pairs."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(10, 9)) / 10
    rows = [
        {"prompt": f"p{i}", "responses": [f"{i}{j}" for j in range(9)], "ranks": [*range(1, 10)]}
        for i in range(10)
    ]
    found = numbered(Dataset.from_list(rows)).rankings
    pairs = comparisons(found, scores.flatten().tolist(), [1] * 90)
    first, second = np.triu_indices(9, 1)
    margins = scores[:, first] - scores[:, second]
    expected = 1 / (1 + np.exp(-np.abs(margins)))
    order = np.argsort(expected, axis=None)
    errors = []
    for _ in range(800):
        places = np.empty((10, 9))
        for i, chances in enumerate(np.exp(scores)):
            best_first = random.choice(9, size=9, replace=False, p=chances / chances.sum())
            places[i, best_first] = range(9)
        right = (places[:, first] < places[:, second]) == (margins > 0)
        off = (expected - right).flatten()[order].reshape(10, 36).sum(axis=1)
        errors.append(np.abs(off).sum() / 360)
    result = calibration_errors(pairs)
    assert result["calibration_floor"] == pytest.approx(np.mean(errors), rel=0.05)
    assert result["calibration_floor_high"] == pytest.approx(np.quantile(errors, 0.95), rel=0.1)
    alone = calibration_errors(pairs_of(margins.flatten().tolist()))
    assert alone["calibration_floor"] < result["calibration_floor"]


def test_a_pair_of_weight_3_counts_as_three_in_a_bin():
    margins = [2.0] * 27 + [-2.0] * 3 + [0.1] * 20 + [-0.1] * 8 + [0.2, -0.2]
    pairs = pairs_of(margins, weights=[1.0] * 58 + [3.0] * 2)
    near, far = calibration(pairs)
    observed = (20 + 3) / (28 + 6)
    expected = (28 / (1 + math.exp(-0.1)) + 6 / (1 + math.exp(-0.2))) / 34
    assert (near["observed"], near["expected"]) == pytest.approx((observed, expected))
    assert (near["pairs"], far["pairs"]) == (30, 30)
    off = 34 * abs(observed - expected) + 30 * abs(0.9 - far["expected"])
    assert calibration_errors(pairs)["calibration_error"] == pytest.approx(off / 64)


@pytest.mark.slow
def test_bins_hold_at_least_30_pairs_and_are_at_most_10():
    torch.manual_seed(0)
    for size, bins in ((1, 1), (59, 1), (60, 2), (3000, 10)):
        result = calibration(pairs_of(torch.randn(size).tolist()))
        assert len(result) == bins
        assert sum(one["pairs"] for one in result) == size
        expected = [one["expected"] for one in result]
        assert expected == sorted(expected)


# ---- length --------------------------------------------------------------------------------------


def test_length_correlation_is_within_prompts():
    """Prompts that ask for longer answers get higher scores; within each, longer is worse."""
    scores = [2.0, 1.0, 12.0, 11.0]
    lengths = [10, 20, 100, 200]
    assert within_prompt_correlation(scores, lengths, [0, 0, 1, 1]) == pytest.approx(-1.0)
    assert within_prompt_correlation(scores, lengths, [0, 0, 0, 0]) > 0


def test_length_correlation_by_hand():
    """Ranks of scores 0, 1, 2; of lengths 0.5, 0.5, 2; their means taken off."""
    value = within_prompt_correlation([1.0, 5.0, 6.0], [7, 7, 9], [0, 0, 0])
    assert value == pytest.approx(1.5 / math.sqrt(2 * 1.5))


def test_length_correlation_of_equal_lengths_is_unknown():
    assert math.isnan(within_prompt_correlation([1.0, 2.0], [3, 3], [0, 0]))


def test_length_is_in_tokens_of_the_response(tokenizer):
    assert list(map(len, response_ids(["abc", "ü"], tokenizer))) == [3, 2]
    said = [[{"role": "assistant", "content": "abc"}]]
    assert list(map(len, response_ids(said, tokenizer))) == [3]


# ---- ceilings ------------------------------------------------------------------------------------


def labeled(*rows):
    return numbered(
        Dataset.from_list(
            [
                {"prompt": p, "responses": list(r), "ranks": ranks, "labeler": labeler}
                for p, r, ranks, labeler in rows
            ]
        )
    ).rankings


def test_agreement_of_two_labelers_by_hand():
    """p: ab alike, ac and bc against each other; q: ab is a tie for y, ac alike, bc alike."""
    agreed = agreement(
        labeled(
            ("p", "abc", [1, 2, 3], "x"),
            ("p", "cab", [1, 2, 3], "y"),
            ("q", "abc", [1, 2, 3], "x"),
            ("q", "bca", [1, 2, 1], "y"),
        )
    )
    variance = ((1 - 3 * 0.6) ** 2 + (2 - 2 * 0.6) ** 2) / 25  # 0.0512, above 0.24 / 5
    prompts, pairs = 12.706205**2 * 2, 2.776445**2 * 5 / 4
    _, low, high = wilson(0.6, 0.24 / variance * pairs / prompts)
    assert agreed == pytest.approx({"mean": 3 / 5, "low": low, "high": high, "pairs": 5})


def test_three_labelers_are_three_couples_and_share_some_responses_only():
    agreed = agreement(
        labeled(("p", "ab", [1, 2], "x"), ("p", "abc", [1, 2, 3], "y"), ("p", "ba", [1, 2], "z"))
    )
    assert (agreed["mean"], agreed["pairs"]) == (pytest.approx(1 / 3), 3)


def test_one_labeler_twice_and_labelers_without_a_name_tell_nothing():
    assert agreement(labeled(("p", "ab", [1, 2], "x"), ("p", "ab", [1, 2], "x"))) is None
    for second in (None, "x"):
        assert agreement(labeled(("p", "ab", [1, 2], None), ("p", "ab", [1, 2], second))) is None
    assert agreement(labeled(("p", "ab", [1, 2], "x"), ("q", "ab", [1, 2], "y"))) is None


def test_the_reliability_of_labelers_by_hand():
    """x and y: ab alike, ac, bc not; x and z: ab not; y and z: ab not; y's q and w alone."""
    found = reliability(
        labeled(
            *(("p", "abc", [1, 2, 3], "x"), ("p", "cab", [1, 2, 3], "y"), ("p", "ba", [1, 2], "z")),
            *(("q", "ab", [1, 2], "y"), ("q", "ab", [1, 2], None), ("r", "ab", [1, 2], "w")),
        )
    )
    assert list(found) == ["z", "x", "y", "w"]
    counts = {name: (row["rankings"], row.get("pairs")) for name, row in found.items()}
    assert counts == {"z": (1, 2), "x": (1, 4), "y": (2, 4), "w": (1, None)}
    assert [found[name]["mean"] for name in "xyz"] == [0.25, 0.25, 0.0]
    assert reliability(labeled(("p", "ab", [1, 2], "x"), ("q", "ab", [2, 1], "x"))) == {}


def test_the_accuracy_on_each_labelers_pairs(tokenizer):
    """x: a > b right, a > c and b > c wrong; y: c > a right; z ties all; nobody: not counted."""
    rows = [
        {**RANKINGS[0], "labeler": "x"},
        {"prompt": "p", "responses": ["c", "aaa"], "ranks": [1, 2], "labeler": "y"},
        {"prompt": "p", "responses": ["c", "aaa"], "ranks": [1, 1], "labeler": "z"},
        {**RANKINGS[1], "labeler": None},
    ]
    found = measure(rows, tokenizer)["by_labeler"]
    assert {name: row["accuracy"] for name, row in found.items()} == {
        "x": pytest.approx(1 / 3),
        "y": 1.0,
    }
    assert measure(rows[:1], tokenizer)["by_labeler"] == {}


def test_ceilings_are_measured_where_they_can_be(tokenizer, measured):
    assert not {"ceiling", "agreement"} & measured.keys()
    rows = [
        {**RANKINGS[1], "labeler": name, "scores": [1.0, 0.0], "gold_scores": gold}
        for name, gold in (("x", [2.0, 1.0]), ("y", [1.0, 2.0]))
    ]
    known = measure(rows, tokenizer)
    assert known["ceiling"] == 0.5
    assert known["agreement"]["mean"] == 1.0


def test_the_noise_ceiling_is_the_accuracy_of_the_gold_scores(tokenizer):
    """p: a pair right, one tied, one wrong by gold; q, whose ranking lost a response: unknown."""
    gold = [0.2, 0.2, 0.8]
    rows = [
        {**RANKINGS[0], "ranks": [1, 3, 2], "gold_scores": gold},
        {**RANKINGS[1], "gold_scores": [0.0, 1.0, 1.0]},
    ]
    known = measure(rows, tokenizer)
    assert known["ceiling"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert known["by_k"]["3"]["ceiling"] == known["ceiling"]
    assert "ceiling" not in known["by_k"]["2"]
    cells = known["by_distance"]
    assert (cells["1"]["ceiling"], cells["2"]["ceiling"]) == (0.5, 0.5)


def test_dissent_by_hand():
    """Three pairs: all members right; one of three against a mean that is right; all wrong."""
    labeled = [Labeled(n, [2 * n, 2 * n + 1], [1, 2], 1.0, None, None) for n in range(3)]
    members = [[2, 0, 1, 0, 0, 1], [4, 0, 2, 0, 0, 3], [3, 0, 0, 1.5, 0, 2]]
    mean = [sum(scores) / 3 for scores in zip(*members, strict=True)]
    pairs, *own = (comparisons(labeled, scores, [1] * 6) for scores in (mean, *members))
    none, one = by_dissent(pairs, torch.stack([part.margins for part in own]))
    assert (none["dissent"], none["pairs"], none["error"]["mean"]) == (0, 2, 0.5)
    assert (one["dissent"], one["pairs"], one["error"]["mean"]) == (1, 1, 0.0)
    # 2, 4, 3 and -1, -3, -2: standard deviation sqrt(2 / 3)
    assert none["disagreement"] == pytest.approx((2 / 3) ** 0.5)


def test_the_best_of_four_and_a_correlation_by_hand():
    found = best_of_k([Labeled(0, [0, 1, 2, 3], [1, 2, 3, 3], 1.0, None, None)], [0.5, 0.5, -1, 0])
    assert (found["best_of_k"], found["best_of_k_chance"]) == (0.5, 0.25)
    assert within_prompt_correlation([1.0, 2.0, 9.0, 8.0], [10, 20, 1, 2], [0, 0, 1, 1]) == 0.0
