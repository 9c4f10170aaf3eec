import math

import pytest
import torch

from trl_instruct.reward_trainer.losses import pair_loss, pair_weights


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def loss_of(scores, ranks):
    return pair_loss(scores.unsqueeze(2), scores.unsqueeze(1), pair_weights(ranks))


def test_loss_is_averaged_per_prompt_first():
    """Three pairs of one prompt weigh as much as the one pair of the other."""
    scores = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 99.0]])
    ranks = torch.tensor([[1, 3, 2], [2, 1, 0]])
    first = (log_sigmoid(1.5) + log_sigmoid(1.0) + log_sigmoid(0.5)) / 3
    second = log_sigmoid(3.0)
    torch.testing.assert_close(loss_of(scores, ranks).item(), -(first + second) / 2)


def test_ties_are_no_pairs_and_a_ranking_without_any_does_not_count():
    scores = torch.tensor([[2.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    ranks = torch.tensor([[1, 1, 2], [1, 1, 1]])
    expected = -(log_sigmoid(2.0) + log_sigmoid(1.0)) / 2
    torch.testing.assert_close(loss_of(scores, ranks).item(), expected)
    assert loss_of(scores[1:], ranks[1:]).item() == 0.0


def test_loss_pulls_the_better_response_up():
    scores = torch.zeros(1, 2, requires_grad=True)
    loss_of(scores, torch.tensor([[2, 1]])).backward()
    assert scores.grad.tolist() == [[0.5, -0.5]]


def test_weights_of_comparisons():
    ranks = torch.tensor([[2, 1, 0], [1, 2, 3], [1, 1, 0]])
    weights = pair_weights(ranks, torch.tensor([1.0, 3.0, 1.0]))
    expected = torch.zeros(3, 3, 3)
    expected[0, 1, 0] = 1 / 2  # two rankings have a winner
    expected[1, 0, 1] = expected[1, 0, 2] = expected[1, 1, 2] = 3 / 3 / 2
    torch.testing.assert_close(weights, expected)


def test_half_a_tie_goes_to_each():
    ranks = torch.tensor([[1, 1, 2], [1, 1, 0]])
    weights = pair_weights(ranks, ties="half")
    expected = torch.tensor([[0, 1 / 2, 1], [1 / 2, 0, 1], [0, 0, 0]]) / 3 / 2
    torch.testing.assert_close(weights[0], expected)
    torch.testing.assert_close(weights[1, 0, 1], torch.tensor(1 / 4))
    scores = torch.tensor([[2.0, -1.0]], requires_grad=True)
    table = scores.unsqueeze(2), scores.unsqueeze(1)
    loss = pair_loss(*table, pair_weights(torch.tensor([[1, 1]]), ties="half"))
    assert loss.item() == pytest.approx(-(log_sigmoid(3.0) + log_sigmoid(-3.0)) / 2)
    loss.backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 1]  # towards each other


def test_centering_pays_for_the_sum_of_the_two_scores():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, -1.0])
    weights = torch.tensor([0.25, 0.75])
    plain = pair_loss(chosen, rejected, weights)
    centered = pair_loss(chosen, rejected, weights, center=0.1)
    assert (centered - plain).item() == pytest.approx(0.1 * (0.25 * 9 + 0.75 * 1))
