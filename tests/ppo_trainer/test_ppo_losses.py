import math

import pytest
import torch

from trl_instruct.ppo_trainer.losses import policy_loss, value_loss


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
    result, cut = policy_loss(*arguments, cliprange=0.2)
    torch.testing.assert_close(result, torch.tensor([[loss]]))
    assert cut.item() is clipped
    # d loss / d logprob = -A * ratio, and nothing where the clip is active
    result.sum().backward()
    gradient = 0.0 if clipped else -advantage * ratio
    torch.testing.assert_close(logprobs.grad, torch.tensor([[gradient]]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.25, 2.0, -2.5, False),  # below the higher clip
        (1.5, 2.0, -2.6, True),
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),  # the lower clip stays
        (4.0, -2.0, 6.0, True),  # counts as 3: the price has an end
        (4.0, 2.0, -2.6, True),  # no matter of the dual clip
    ],
)
def test_a_higher_and_a_dual_clip_by_hand(ratio, advantage, loss, clipped):
    logprobs = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    arguments = (logprobs, torch.tensor([-3.0]), torch.tensor([advantage]))
    result, cut = policy_loss(*arguments, cliprange=0.2, cliprange_high=0.3, dual_clip=3.0)
    torch.testing.assert_close(result, torch.tensor([loss]))
    assert cut.item() is clipped
    result.sum().backward()
    gradient = 0.0 if clipped else -advantage * ratio
    torch.testing.assert_close(logprobs.grad, torch.tensor([gradient]))


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.405, False),
        (1.0, 0.0, 1.0, 0.32, True),  # counts as 0.2
        (-1.0, 0.0, -1.0, 0.32, True),  # counts as -0.2
        (1.0, 0.0, -1.0, 2.0, False),  # the wrong way: the full price
        (3.0, 3.0, 1.0, 2.0, False),
        (1.0, 0.9, 2.0, 0.5, False),  # the clip is around the old value, not around 0
    ],
)
def test_value_loss_by_hand(value, old, target, loss, clipped):
    arguments = [torch.tensor([[number]]) for number in (value, old, target)]
    result, cut = value_loss(*arguments, cliprange_value=0.2)
    torch.testing.assert_close(result, torch.tensor([[loss]]))
    assert cut.item() is clipped
