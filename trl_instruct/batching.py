"""Which rows go into a batch together."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

FULL = 0.8
"""Least share of a batch that is text."""


def similar_lengths(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches for forward passes, the shortest first, so that little is padding.

    A batch ends before it has `batch_size` rows where more than a fifth of it would be padding.

    >>> similar_lengths([9, 3, 10, 3], 8)
    [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch = [*batches[-1], row] if batches else [row]
        tokens, width = sum(lengths[r] for r in batch), lengths[row]
        if batches and len(batch) <= batch_size and tokens >= FULL * len(batch) * width:
            batches[-1] = batch
        else:
            batches.append([row])
    return batches


def length_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, pool: int = 50
) -> list[int]:
    """An order of rows in which each batch holds similar lengths and batches come at random.

    transformers' own group_by_length sorts the batches of a pool too, so that long and short texts
    come in waves; a small model then learns markedly less.

    >>> sorted(length_batches([3, 1, 2], 2, seed=0))
    [0, 1, 2]
    """
    rng = random.Random(seed)
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    order: list[int] = []
    for start in range(0, len(rows), batch_size * pool):
        drawn = sorted(rows[start : start + batch_size * pool], key=lambda row: lengths[row])
        cuts = list(range(0, len(drawn), batch_size))
        rng.shuffle(cuts)
        order += [row for cut in cuts for row in drawn[cut : cut + batch_size]]
    return order


class LengthBatchSampler(Sampler[int]):
    """The rows of a dataset in the order of `length_batches`, another one in every epoch.

    Args:
        lengths: tokens in each row.
        batch_size: rows that are computed at the same time, in all processes.
        seed: the same in all processes.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch starts; a resumed run meets the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_batches(self.lengths, self.batch_size, seed=self.seed + self.epoch))


def pad_rows(rows: list[list[int]], filler: int) -> Tensor:
    """Rows of unequal length as one tensor, padded on the right.

    >>> pad_rows([[1, 2], [3]], 0).tolist()
    [[1, 2], [3, 0]]
    """
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler)
