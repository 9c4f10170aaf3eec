"""Shared rows: every token has the company and the position that it has in a row of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from trl_instruct.padding import pad_rows
from trl_instruct.reward_trainer.prefix import (
    common_prefix,
    prefix_blocks,
    prefix_mask,
    share_prefix,
    sharing_pays,
    split_attention,
)


def share(*rankings):
    rows = [row for ranking in rankings for row in ranking]
    lengths = torch.tensor([len(row) for row in rows])
    return share_prefix(pad_rows(rows, 99), lengths, torch.tensor([len(r) for r in rankings]))


def test_two_rankings_by_hand():
    shared = share([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 6]], [[7, 8], [7, 9]])
    assert shared.input_ids.tolist() == [[1, 2, 3, 4, 5, 3, 6], [7, 8, 9, 0, 0, 0, 0]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 2, 3, 2, 3], [0, 1, 1, 0, 0, 0, 0]]
    assert shared.segments.tolist() == [[0, 0, 1, 2, 2, 3, 3], [0, 1, 2, -1, -1, -1, -1]]
    assert shared.rows.tolist() == [0, 0, 0, 1, 1]
    assert shared.columns[2].tolist() == [0, 1, 5, 6]


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        ([[1, 2, 3], [1, 5, 3]], 1),  # what comes after a difference is not shared
        ([[1, 2, 3], [1, 2, 3]], 2),  # the same response twice: the last token stays its own
        ([[1, 2, 3, 4], [1, 2, 3]], 2),  # one is the beginning of the other
        ([[1, 2, 3], [4, 2, 3]], 0),
        ([[1, 2, 99], [1, 2, 99, 99]], 2),  # tokens that look like padding
    ],
)
def test_what_is_shared(rows, prefix):
    lengths = torch.tensor([len(row) for row in rows])
    assert common_prefix(pad_rows(rows, 99), lengths, torch.tensor([len(rows)])) == prefix


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=5)
rankings = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=4), st.lists(tokens, min_size=2, max_size=4)),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(rankings)
def test_a_token_sees_its_own_row_up_to_itself_and_nothing_else(drawn):
    groups = [[prompt + response for response in responses] for prompt, responses in drawn]
    shared = share(*groups)
    visible = prefix_mask(shared.segments, torch.float32)[:, 0] == 0
    rows = [row for group in groups for row in group]
    for row, where, columns in zip(rows, shared.rows, shared.columns, strict=True):
        for position, token in enumerate(row):
            column = columns[position]
            assert shared.input_ids[where, column] == token
            assert shared.position_ids[where, column] == position
            seen = visible[where, column].nonzero().flatten().tolist()
            assert seen == columns[: position + 1].tolist()
    assert visible.any(dim=2).all()  # padding too: softmax over nothing is not a number
    blocks = prefix_blocks(shared.segments)
    assert torch.equal(create_mask(blocks.mask_mod, *visible[:, None].shape, "cpu")[:, 0], visible)


def test_blocks_that_nothing_is_seen_in():
    """Of a prompt and two responses of 128 tokens each, the second does not see the first."""
    prompt, one, two = (torch.arange(128) + start for start in (0, 200, 400))
    rows = [torch.cat([prompt, response]).tolist() for response in (one, two)]
    blocks = prefix_blocks(share(rows).segments).to_dense()[0, 0]
    assert blocks.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention_by_two_calls_is_that_of_separate_rows(heads):
    """No prefix; a prefix and responses of one token; a single response; other numbers of them."""
    torch.manual_seed(0)
    lengths = [[3, 2, 4, 1], [0, 2, 1], [1, 1, 1], [5, 3]]
    total = sum(map(sum, lengths))
    tensors = [torch.randn(1, n, total, 8, requires_grad=True) for n in (4, heads, heads)]
    weights = torch.randn(1, total, 4, 8)

    def attend(query, key, value, mask):
        causal = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, **causal)
        return attended.transpose(1, 2)

    expected, start = torch.zeros_like(weights), 0
    for prefix, *own in lengths:
        before, start = list(range(start, start + prefix)), start + prefix
        for size in own:
            row = before + list(range(start, start + size))
            alone = attend(*(each[:, :, row] for each in tensors), None)
            expected = expected.index_copy(1, torch.tensor(row), alone)
            start += size
    found = split_attention(attend, tensors, lengths)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((out * weights).sum(), tensors) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


@settings(max_examples=50, deadline=None)
@given(rankings)
def test_a_row_is_as_long_as_its_prefix_and_what_each_response_adds(drawn):
    groups = [[prompt + response for response in responses] for prompt, responses in drawn]
    widths = []
    for rows in groups:
        lengths = torch.tensor([len(row) for row in rows])
        prefix = int(common_prefix(pad_rows(rows, 99), lengths, torch.tensor([len(rows)])))
        widths.append(prefix + sum(len(row) - prefix for row in rows))
    assert ((share(*groups).segments >= 0).sum(dim=1)).tolist() == widths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_is_of_the_models_kind_and_of_the_longest_row(dtype):
    mask = prefix_mask(share([[1, 2, 3], [1, 4]], [[5], [6]]).segments, dtype)
    assert (mask.dtype, mask.shape) == (dtype, (2, 1, 4, 4))
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}


def test_sharing_pays_for_short_responses():
    assert sharing_pays((1, 832), (9, 320), hidden_size=768)
    assert not sharing_pays((1, 3630), (9, 430), hidden_size=768)


def test_prefix_and_mask_by_hand():
    rows = torch.tensor([[7, 8, 1], [7, 8, 0], [7, 9, 1]])
    assert common_prefix(rows, torch.tensor([3, 2, 3]), torch.tensor([2, 1])).tolist() == [1, 2]
    seen = (prefix_mask(torch.tensor([[0, 1, 1, 2]]), torch.float32) == 0).int()
    assert seen.tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]]]
