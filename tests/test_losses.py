import math

import pytest
import torch

from trl_instruct.losses import (
    entropy,
    policy_clipped,
    policy_loss,
    token_logprobs,
    value_clipped,
    value_loss,
)


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
    for token, p in ((1, probability), (0, 1 - probability)):
        logprob = token_logprobs(LOGITS, torch.tensor([[token]]), temperature=temperature)
        torch.testing.assert_close(logprob, torch.tensor([[math.log(p)]]))
    expected = -sum(p * math.log(p) for p in (probability, 1 - probability))
    torch.testing.assert_close(entropy(LOGITS, temperature=temperature), torch.tensor([[expected]]))


def test_logprobs_are_float32_and_stable():
    logits = torch.tensor([[[1e4, 0.0]]], dtype=torch.bfloat16)
    logprobs = token_logprobs(logits, torch.tensor([[0]]), temperature=1.0)
    assert logprobs.dtype is torch.float32
    assert logprobs.item() == 0.0
