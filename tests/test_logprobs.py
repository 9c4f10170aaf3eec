import math

import pytest
import torch

from trl_instruct.logprobs import entropy, log_distribution, logprobs_in_parts, token_logprobs

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


def test_four_tokens_that_are_equally_likely():
    even = log_distribution(torch.zeros(1, 4), temperature=1.0)
    torch.testing.assert_close(even.exp(), torch.full((1, 4), 0.25))
    torch.testing.assert_close(entropy(even).exp(), torch.tensor([4.0]))
    parts = logprobs_in_parts(torch.zeros(2, 4), torch.tensor([0, 3]), temperature=1.0)
    torch.testing.assert_close(parts.exp(), torch.full((2,), 0.25))
    assert token_logprobs(torch.tensor([[-1.0, -2.0]]), torch.tensor([1])).tolist() == [-2.0]
