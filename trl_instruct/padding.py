"""Masks and positions from lengths.

A mask is True on tokens that count. It is always built from lengths, never by comparing token
values, so a pad token that equals the EOS token is safe.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler


def left_padded_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask `(B, width)` of sequences, of lengths `(B,)`, at the right end of their row (prompts).

    >>> left_padded_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[0, 0, 1], [1, 1, 1]]
    """
    return torch.arange(width, device=lengths.device) >= width - lengths.unsqueeze(1)


def right_padded_mask(lengths: Tensor, width: int) -> Tensor:
    """Like `left_padded_mask`, for sequences at the left end of their row (completions)."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def position_ids(mask: Tensor) -> Tensor:
    """Position of each token among the real tokens of its row, `(B, T)` int64; padding gets 0."""
    return (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, 0)


def padding_before(mask: Tensor) -> Tensor:
    """Columns before each row's first real token, `(B,)` int64, by a mask `(B, T)`."""
    return mask.int().argmax(dim=1)


def roll_rows(values: Tensor, columns: Tensor) -> Tensor:
    """Roll each row of `(B, T, ...)` to the left by its own number of columns `(B,)`.

    What leaves re-enters at the right; a negative number moves to the right.

    >>> roll_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, -1])).tolist()
    [[2, 3, 1], [6, 4, 5]]
    """
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    source = torch.arange(values.shape[1], device=values.device) + columns.unsqueeze(1)
    return values[rows, source % values.shape[1]]


def completion_lengths(completion_ids: Tensor, eos_token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Length of each sampled completion, including its first EOS, and whether it has one.

    From `(B, C)` ids come `(B,)` int64 in 1..C and `(B,)` bool. Tokens after the first EOS are
    filler and ignored, whatever their value.
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_token_ids, device=completion_ids.device))
    ended = is_eos.any(dim=1)
    first_eos = is_eos.int().argmax(dim=1)
    return torch.where(ended, first_eos + 1, completion_ids.shape[1]), ended


FULL = 0.8  # minimum fraction of a batch that is text


def similar_lengths(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of up to `batch_size` rows, shortest first, 20 % padding at most."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch = [*batches[-1], row] if batches else [row]
        tokens, width = sum(lengths[r] for r in batch), lengths[row]
        if batches and len(batch) <= batch_size and tokens >= FULL * len(batch) * width:
            batches[-1] = batch
        else:
            batches.append([row])
    return batches


def length_batches(lengths: Sequence[int], batch_size: int, *, seed: int) -> list[int]:
    """An order of rows in which each batch has similar lengths and batches come at random.

    If the rows do not fill the last batch, the short one comes last, so that no batch holds parts
    of two; its lengths are drawn, so that dropping it favours none.

    transformers' group_by_length also sorts the batches of a pool: long and short texts then come
    in waves, and a small model learns markedly less.
    """
    rng, pool = random.Random(seed), 50 * batch_size
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    order: list[int] = []
    for start in range(0, len(rows), pool):
        drawn = sorted(rows[start : start + pool], key=lambda row: lengths[row])
        last: list[int] = []
        if short := len(drawn) % batch_size:
            first = rng.randrange(len(drawn) - short + 1)
            last, drawn[first : first + short] = drawn[first : first + short], []
        cuts = list(range(0, len(drawn), batch_size))
        rng.shuffle(cuts)
        order += [row for cut in cuts for row in drawn[cut : cut + batch_size]] + last
    return order


class LengthBatchSampler(Sampler[int]):
    """The rows in the order of `length_batches`, new in every epoch, the same in all processes."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch starts; a resumed run gets the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_batches(self.lengths, self.batch_size, seed=self.seed + self.epoch))


def pad_rows(rows: Sequence[Sequence[int]], filler: int, *, side: str = "right") -> Tensor:
    """Rows of unequal length as one tensor, padded on the right or left."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side)


def unpadded(ids: Tensor, lengths: Tensor) -> list[list[int]]:
    """The rows of `(B, T)` without padding on the right."""
    rows = zip(ids.tolist(), lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]
