import math
from itertools import combinations

import pytest
import torch

from trl_instruct.evaluation.statistics import best_of_n, best_of_n_kl, chances_to_be_best


def test_the_kl_is_that_of_stiennon_et_al():
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_kl(64) == pytest.approx(math.log(64) - 63 / 64)


def test_the_kl_is_that_of_the_chosen_distribution():
    """Best of n of a fine uniform distribution: density n u^(n-1), KL = E log(n u^(n-1))."""
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = u ** (1 / 4)
    assert (4 * best**3).log().mean().item() == pytest.approx(best_of_n_kl(4), abs=5e-3)


def test_three_samples_by_hand():
    """Of the pairs of a 3, b 1, c 2: a is best in ab and ac, c in bc."""
    judge, gold = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[10.0, 20.0, 40.0]])
    points = best_of_n(judge, {"judge": judge, "gold": gold})
    assert [point["n"] for point in points] == [1, 2, 3]
    assert [point["scores"]["judge"] for point in points] == pytest.approx([2, 8 / 3, 3])
    assert [p["scores"]["gold"] for p in points] == pytest.approx([70 / 3, 20 / 3 + 40 / 3, 10])
    assert points[0]["kl"] == 0


def test_the_chances_are_those_of_all_subsets():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    for n in range(1, 8):
        subsets = list(combinations(range(7), n))
        for row in range(3):
            best = [max(subset, key=lambda i: scores[row, i].item()) for subset in subsets]
            expected = [best.count(i) / len(subsets) for i in range(7)]
            assert chances_to_be_best(scores, n)[row].tolist() == pytest.approx(expected)


def test_samples_of_equal_score_share_their_chances():
    """1 1 0: of the three pairs the two equal ones win all, whatever their order."""
    for order in ([1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
        chances = chances_to_be_best(torch.tensor([order]), 2)[0]
        assert chances.tolist() == pytest.approx([one / 2 for one in order])


def test_a_judge_that_sees_no_difference_gains_nothing():
    gold = torch.tensor([[1.0, 2.0, 6.0]])
    points = best_of_n(torch.zeros(1, 3), {"gold": gold})
    assert [point["scores"]["gold"] for point in points] == pytest.approx([3.0] * 3)


def test_prompts_count_the_same():
    judge = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    assert best_of_n(judge, {"it": judge})[1]["scores"]["it"] == pytest.approx((1 + 100) / 2)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (16, [1, 2, 4, 8, 16])]
)
def test_sizes_double_up_to_all_samples(most, expected):
    assert [point["n"] for point in best_of_n(torch.zeros(1, most), {})] == expected


def test_the_best_of_two_by_hand():
    assert best_of_n_kl(1) == 0.0
    chances = chances_to_be_best(torch.tensor([[3.0, 1.0, 2.0]]), 2)  # pairs 31, 32, 12
    torch.testing.assert_close(chances, torch.tensor([[2 / 3, 0, 1 / 3]], dtype=torch.float64))
