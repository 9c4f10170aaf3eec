"""K responses after ONE copy of their prompt: ids, positions, attention mask, where to read.

A ranking's rows [prompt, response 1], ..., [prompt, response K] begin alike. A shared row
[prompt, response 1, ..., response K] computes their common prefix once. A response sees the prompt
and itself, at positions after the prompt's: each hidden state is the same as in a separate row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence


class SharedRows(NamedTuple):
    """B shared rows of S tokens for R responses in all, padded on the right.

    input_ids, position_ids `(B, S)`; segments `(B, S)`: 0 = shared prefix, k = only the ranking's
    k-th response, -1 = padding; rows `(R,)`, columns `(R, T)`: place of each separate row's tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    rows: Tensor
    columns: Tensor


def share_prefix(input_ids: Tensor, lengths: Tensor, counts: Tensor) -> SharedRows:
    """The shared rows of rankings that have one row per response.

    The common prefix of the token rows is shared, not the prompt's text: a tokenizer may merge its
    last letters with a response's first, and a chat template may begin the response.

    Args:
        input_ids: `(R, T)` prompt + response, padded on the right; a ranking's rows are adjacent.
        lengths: `(R,)` tokens in each row.
        counts: `(B,)` rows of each ranking; their sum is R.

    >>> rows = torch.tensor([[7, 8, 1, 0], [7, 8, 2, 3]])
    >>> shared = share_prefix(rows, torch.tensor([3, 4]), torch.tensor([2]))
    >>> shared.input_ids.tolist(), shared.position_ids.tolist(), shared.segments.tolist()
    ([[7, 8, 1, 2, 3]], [[0, 1, 2, 2, 3]], [[0, 0, 1, 2, 2]])
    >>> shared.columns.tolist()[1]
    [0, 1, 3, 4]
    """
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    prefix = common_prefix(input_ids, lengths, counts).repeat_interleave(counts)
    own = lengths - prefix
    before = own.cumsum(0) - own
    before = before - before[first]
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    is_own = position >= prefix.unsqueeze(1)
    columns = position + torch.where(is_own, before.unsqueeze(1), 0)
    segment = torch.arange(1, len(rows) + 1, device=rows.device) - first
    real = position < lengths.unsqueeze(1)
    place = rows.unsqueeze(1).expand_as(input_ids)[real], columns[real]
    shape = len(counts), int(columns[real].max()) + 1

    def placed(values: Tensor, filler: int) -> Tensor:
        # Each response writes the prefix, always with the same values.
        return values.new_full(shape, filler).index_put(place, values[real])

    return SharedRows(
        placed(input_ids, 0),
        placed(position, 0),
        placed(torch.where(is_own, segment.unsqueeze(1), 0), -1),
        rows,
        columns,
    )


def common_prefix(input_ids: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """Length `(B,)` of the prefix of each ranking's rows. Arguments as in `share_prefix`.

    A row's last token, where its score is read, is never shared.
    """
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    inside = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths.unsqueeze(1) - 1
    agrees = (input_ids == input_ids[first]) & inside
    alike = agrees.long().cumprod(dim=1).sum(dim=1)
    return counts.new_zeros(counts.shape).scatter_reduce(0, rows, alike, "amin", include_self=False)


def split_attention(
    attend: Callable[..., Tensor], tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]]
) -> Tensor:
    """Attention `(1, N, H, D)` of shared rows, joined without padding, by two calls for each.

    A prefix attends to itself; its responses, padded at their end, to copies of it and themselves.
    `attend` goes from query, key, value `(R, H, T, D)` and a mask (None: causal) to `(R, T, H, D)`.
    The tensors are query, key, value `(1, H, N, D)`; key and value may have fewer heads. The
    lengths of each row are those of the prefix, then what each response adds; their sum is N.
    """
    sizes = [size for row in lengths for size in row]
    # Query, key and value `(H, T, D)` of each prefix and response.
    parts = zip(*(each[0].split(sizes, dim=1) for each in tensors), strict=True)
    outputs: list[Tensor] = []
    for prefix, *own in lengths:
        first = next(parts)
        if prefix:
            outputs += attend(*(each.unsqueeze(0) for each in first), None)
        query, *seen = (
            pad_sequence([r.transpose(0, 1) for r in rows], batch_first=True).transpose(1, 2)
            for rows in zip(*[next(parts) for _ in own], strict=True)
        )
        copies = (each.expand(len(own), -1, -1, -1) for each in first[1:])
        key, value = (torch.cat(both, dim=2) for both in zip(copies, seen, strict=True))
        mask = torch.ones(1, 1, max(own), key.shape[2], dtype=torch.bool, device=key.device)
        answered = attend(query, key, value, mask.tril(prefix))
        outputs += [row[:size] for row, size in zip(answered, own, strict=True)]
    return torch.cat(outputs).unsqueeze(0)


def prefix_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention mask of shared rows: the prefix is causal, a response sees the prefix and itself.

    `(B, 1, S, S)`, to be added to attention scores of that dtype: 0 where the query (row) sees the
    key (column), else the lowest number. Padding sees something too, or softmax is 0/0.
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    visible = _visible(segments.unsqueeze(2), segments.unsqueeze(1), place.unsqueeze(1), place)
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def prefix_blocks(segments: Tensor) -> BlockMask:
    """The same for FlexAttention, which skips 128 x 128 blocks in which everything is hidden."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _visible(segments[row, query], segments[row, key], query, key)

    rows, width = segments.shape
    return create_block_mask(visible, rows, None, width, width, device=str(segments.device))


def _visible(query: Tensor, key: Tensor, query_place: Tensor, key_place: Tensor) -> Tensor:
    """Whether the query sees the key, by the segment and place of both."""
    return ((key == 0) | (key == query)) & (key_place <= query_place)


def sharing_pays(shared: Sequence[int], separate: Sequence[int], hidden_size: int) -> bool:
    """Whether shared rows with a mask are less work than one row per response.

    A layer's work on a row of T tokens is about T (24 h^2 + 4 T h), with h the hidden size: the
    mask hides responses from each other after all were compared. `shared` and `separate` are the
    shapes `(B, S)` and `(R, T)` of the rows.
    """
    works = [rows * t * (6 * hidden_size + t) for rows, t in (shared, separate)]
    return works[0] < works[1]
