import math

import pytest
import torch

from trl_instruct.logprobs import entropy, log_distribution, token_logprobs
from trl_instruct.ppo_trainer.losses import policy_clipped, policy_loss, value_clipped, value_loss
from trl_instruct.reward_trainer.losses import pair_loss, pair_weights, ranking_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.1, -2.0, 2.2, False),
        (1.5, 2.0, -2.4, True),  # already likelier: no more than 1.2
        (1.5, -2.0, 3.0, False),  # the wrong way: the full price
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clipped):
    logprobs = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    arguments = (logprobs, torch.tensor([[-3.0]]), torch.tensor([[advantage]]))
    result = policy_loss(*arguments, cliprange=0.2)
    torch.testing.assert_close(result, torch.tensor([[loss]]))
    assert policy_clipped(*arguments, cliprange=0.2).item() is clipped
    # d loss / d logprob = -A * ratio, and nothing where the clip is active
    result.sum().backward()
    gradient = 0.0 if clipped else -advantage * ratio
    torch.testing.assert_close(logprobs.grad, torch.tensor([[gradient]]))


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.405, False),
        (1.0, 0.0, 1.0, 0.32, True),  # counts as 0.2
        (-1.0, 0.0, -1.0, 0.32, True),  # counts as -0.2
        (1.0, 0.0, -1.0, 2.0, False),  # the wrong way: the full price
        (3.0, 3.0, 1.0, 2.0, False),
    ],
)
def test_value_loss_by_hand(value, old, target, loss, clipped):
    arguments = [torch.tensor([[number]]) for number in (value, old, target)]
    result = value_loss(*arguments, cliprange_value=0.2)
    torch.testing.assert_close(result, torch.tensor([[loss]]))
    assert value_clipped(*arguments, cliprange_value=0.2).item() is clipped


# Logits 0 and ln 3: odds of 1 to 3, squared at temperature 1/2, their root at temperature 2.
LOGITS = torch.tensor([[[0.0, math.log(3.0)]]])


@pytest.mark.parametrize(
    ("temperature", "probability"), [(1.0, 3 / 4), (0.5, 9 / 10), (2.0, 1 / (1 + 3**-0.5))]
)
def test_logprobs_and_entropy_are_those_of_the_sampling_temperature(temperature, probability):
    log_probs = log_distribution(LOGITS, temperature=temperature)
    for token, p in ((1, probability), (0, 1 - probability)):
        logprob = token_logprobs(log_probs, torch.tensor([[token]]))
        torch.testing.assert_close(logprob, torch.tensor([[math.log(p)]]))
    expected = -sum(p * math.log(p) for p in (probability, 1 - probability))
    torch.testing.assert_close(entropy(log_probs), torch.tensor([[expected]]))


def test_logprobs_are_float32_and_stable():
    logits = torch.tensor([[[1e4, 0.0]]], dtype=torch.bfloat16)
    logprobs = token_logprobs(log_distribution(logits, temperature=1.0), torch.tensor([[0]]))
    assert logprobs.dtype is torch.float32
    assert logprobs.item() == 0.0


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_loss_is_averaged_per_prompt_first():
    """Three pairs of one prompt weigh as much as the one pair of the other."""
    scores = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 99.0]])
    ranks = torch.tensor([[1, 3, 2], [2, 1, 0]])
    first = (log_sigmoid(1.5) + log_sigmoid(1.0) + log_sigmoid(0.5)) / 3
    second = log_sigmoid(3.0)
    torch.testing.assert_close(ranking_loss(scores, ranks).item(), -(first + second) / 2)


def test_ties_are_no_pairs_and_a_ranking_without_any_does_not_count():
    scores = torch.tensor([[2.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    ranks = torch.tensor([[1, 1, 2], [1, 1, 1]])
    expected = -(log_sigmoid(2.0) + log_sigmoid(1.0)) / 2
    torch.testing.assert_close(ranking_loss(scores, ranks).item(), expected)
    assert ranking_loss(scores[1:], ranks[1:]).item() == 0.0


def test_loss_pulls_the_better_response_up():
    scores = torch.zeros(1, 2, requires_grad=True)
    ranking_loss(scores, torch.tensor([[2, 1]])).backward()
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
