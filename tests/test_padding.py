import math
import statistics

import pytest
import torch

from trl_instruct.padding import (
    completion_lengths,
    left_padded_mask,
    pad_rows,
    padding_before,
    position_ids,
    right_padded_mask,
    unpadded,
)
from trl_instruct.ppo_trainer.advantages import masked_mean, masked_moments, masked_whiten
from trl_instruct.ppo_trainer.metrics import step_means

VALUES = torch.tensor([[1.0, 2.0, 6.0], [4.0, math.nan, math.inf]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
REAL = [1.0, 2.0, 6.0, 4.0]


def test_masks_stand_at_their_end_of_the_row():
    lengths = torch.tensor([0, 2, 3])
    assert left_padded_mask(lengths, 3).int().tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]
    assert right_padded_mask(lengths, 3).int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[False, False, True, True, False], [True] * 5])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("tokens", "length", "ended"),
    [
        ([5, 9, 9, 9], 2, True),  # filler that equals the EOS, as with pad == eos
        ([5, 9, 0, 0], 2, True),
        ([9, 5, 9, 5], 1, True),
        ([5, 6, 7, 9], 4, True),
        ([5, 6, 7, 8], 4, False),
        ([5, 3, 9, 9], 2, True),  # the second of two EOS tokens
    ],
)
def test_a_completion_ends_with_its_first_eos_included(tokens, length, ended):
    assert completion_lengths(torch.tensor([tokens]), [9, 3]) == (
        torch.tensor([length]),
        torch.tensor([ended]),
    )


def test_masked_mean_weighs_every_real_token_alike():
    assert masked_mean(VALUES, MASK).item() == 3.25
    assert masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0.0


def test_whitening_gives_mean_0_and_variance_1_over_the_real_tokens():
    mean, deviation = statistics.mean(REAL), statistics.stdev(REAL)
    expected = [(value - mean) / deviation for value in REAL]
    whitened = masked_whiten(VALUES, MASK)
    torch.testing.assert_close(whitened[MASK], torch.tensor(expected))
    assert whitened[~MASK].tolist() == [0.0, 0.0]


def test_whitening_without_shift_keeps_the_mean():
    mean, deviation = statistics.mean(REAL), statistics.stdev(REAL)
    expected = [(value - mean) / deviation + mean for value in REAL]
    whitened = masked_whiten(VALUES, MASK, shift_mean=False)
    torch.testing.assert_close(whitened[MASK], torch.tensor(expected))
    assert whitened[~MASK].tolist() == [0.0, 0.0]


def test_whitening_leaves_its_argument_alone_and_survives_a_single_token():
    values = torch.tensor([[3.0, 5.0]])
    assert masked_whiten(values, torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert values.tolist() == [[3.0, 5.0]]


def test_rows_and_their_padding_by_hand():
    assert right_padded_mask(torch.tensor([1, 3]), 3).int().tolist() == [[1, 0, 0], [1, 1, 1]]
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert position_ids(mask).tolist() == [[0, 0, 1], [0, 1, 0]]
    assert padding_before(torch.tensor([[0, 0, 1], [1, 1, 0]])).tolist() == [2, 0]
    lengths, ended = completion_lengths(torch.tensor([[5, 2, 2], [5, 6, 7]]), [2])
    assert (lengths.tolist(), ended.tolist()) == ([2, 3], [True, False])
    assert pad_rows([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]
    assert unpadded(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])) == [[1, 2], [3]]


def test_moments_and_means_by_hand():
    moments = masked_moments(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    assert [value.item() for value in moments] == [2.0, 2.0]
    found = step_means([{"val/ratio": 0.5}, {"val/ratio": 1.5}])
    assert found == {"val/ratio": 1.0, "val/ratio_var": 0.25, "policy/steps": 2}
