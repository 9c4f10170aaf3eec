"""Masks and positions from lengths.

A mask is True on tokens that count. It is always built from lengths, never by comparing token
values, so a pad token that equals the EOS token is safe.
"""

import torch
from torch import Tensor


def left_padded_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask of sequences that stand at the right end of their row (prompts).

    Args:
        lengths: `(B,)` number of real tokens in each row.
        width: row width.

    Returns:
        `(B, width)` bool.

    >>> left_padded_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[0, 0, 1], [1, 1, 1]]
    """
    columns = torch.arange(width, device=lengths.device)
    return columns >= width - lengths.unsqueeze(1)


def right_padded_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask of sequences that stand at the left end of their row (completions).

    Args:
        lengths: `(B,)` number of real tokens in each row.
        width: row width.

    Returns:
        `(B, width)` bool.

    >>> right_padded_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    columns = torch.arange(width, device=lengths.device)
    return columns < lengths.unsqueeze(1)


def position_ids(mask: Tensor) -> Tensor:
    """Position of each token among the real tokens of its row; padding gets 0.

    Args:
        mask: `(B, T)` bool, True on real tokens.

    Returns:
        `(B, T)` int64.

    >>> position_ids(torch.tensor([[False, True, True], [True, True, False]])).tolist()
    [[0, 0, 1], [0, 1, 0]]
    """
    return (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, 0)


def padding_before(mask: Tensor) -> Tensor:
    """Columns in front of each row's first real token.

    Args:
        mask: `(B, T)` bool or 0 / 1.

    Returns:
        `(B,)` int64.

    >>> padding_before(torch.tensor([[0, 0, 1], [1, 1, 0]])).tolist()
    [2, 0]
    """
    return mask.int().argmax(dim=1)


def roll_rows(values: Tensor, columns: Tensor) -> Tensor:
    """Each row moved to the left by its own number of columns; what leaves comes in at the right.

    Args:
        values: `(B, T, ...)`.
        columns: `(B,)`; a negative number moves to the right.

    >>> roll_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, -1])).tolist()
    [[2, 3, 1], [6, 4, 5]]
    """
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    source = torch.arange(values.shape[1], device=values.device) + columns.unsqueeze(1)
    return values[rows, source % values.shape[1]]


def completion_lengths(completion_ids: Tensor, eos_token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Length of each sampled completion, its first EOS included, and whether it has one.

    What a sampler leaves behind the first EOS is filler and never looked at, whatever its value.

    Args:
        completion_ids: `(B, C)` sampled tokens, filler behind the first EOS.
        eos_token_ids: the tokens that end a completion.

    Returns:
        lengths `(B,)` int64 in 1..C and ended `(B,)` bool.

    >>> completion_lengths(torch.tensor([[5, 2, 2], [5, 6, 7]]), [2])
    (tensor([2, 3]), tensor([ True, False]))
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_token_ids, device=completion_ids.device))
    ended = is_eos.any(dim=1)
    first_eos = is_eos.int().argmax(dim=1)
    return torch.where(ended, first_eos + 1, completion_ids.shape[1]), ended


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is True; every such token weighs the same.

    Args:
        values: `(B, T)` float.
        mask: `(B, T)` bool.

    Returns:
        scalar; 0 where the mask is False everywhere.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the values where the mask is True.

    Args:
        values: `(B, T)` float.
        mask: `(B, T)` bool.

    Returns:
        Two scalars. The variance of a single value is 0.

    >>> masked_moments(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    (tensor(2.), tensor(2.))
    """
    mean, count = masked_mean(values, mask), mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    return mean, variance


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Values scaled to variance 1 over the real tokens, and shifted to mean 0.

    Args:
        values: `(B, T)` float.
        mask: `(B, T)` bool.
        shift_mean: False keeps the mean (used for rewards, whose sign carries meaning).
        moments: mean and variance to go by, where these values are only a process's share of all;
            default: those of the values. The variance is the unbiased one, as in
            lm-human-preferences and TRL.

    Returns:
        `(B, T)`; 0 where the mask is False.

    >>> masked_whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [[-0.7071067690849304, 0.7071067690849304, 0.0]]
    """
    mean, variance = moments or masked_moments(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
