import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_instruct.padding import LengthBatchSampler, length_batches, similar_lengths


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_batches_for_forward_passes_hold_every_row_once_and_little_padding(lengths, batch_size):
    batches = similar_lengths(lengths, batch_size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    for batch in batches:
        inside = [lengths[row] for row in batch]
        assert len(batch) <= batch_size
        assert sum(inside) >= 0.8 * len(inside) * max(inside)
    for batch, following in pairwise(batches):  # no batch ends too early
        longer = [lengths[row] for row in [*batch, following[0]]]
        assert len(longer) > batch_size or sum(longer) < 0.8 * len(longer) * max(longer)


def test_length_batches_are_of_a_length_and_in_no_order():
    lengths = [n % 20 for n in range(200)]
    order = length_batches(lengths, 10, seed=0)
    assert sorted(order) == list(range(200))
    batches = [[lengths[row] for row in order[i : i + 10]] for i in range(0, 200, 10)]
    assert all(max(batch) - min(batch) <= 1 for batch in batches)
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)
    assert length_batches(lengths, 10, seed=1) != order


@pytest.mark.parametrize("rows", [392, 395, 801])
def test_rows_that_do_not_fill_the_last_batch_cost_no_padding(rows):
    rng = random.Random(0)
    lengths = [rng.randint(10, 200) for _ in range(rows)]
    lasts = []
    for seed in range(10):
        order = length_batches(lengths, 8, seed=seed)
        assert sorted(order) == list(range(rows))
        assert order == length_batches(lengths, 8, seed=seed)
        batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, rows, 8)]
        computed = sum(len(batch) * max(batch) for batch in batches)
        assert 1 - sum(lengths) / computed < 0.03
        lasts.append(max(batches[-1]))
    assert min(lasts) < 80 < 130 < max(lasts)  # dropping the short batch favours no length


def test_every_epoch_has_an_order_of_its_own_that_comes_back():
    sampler = LengthBatchSampler([n % 20 for n in range(200)], 10, seed=3)
    first = list(sampler)
    assert len(sampler) == len(first) == 200
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_small_batches_by_hand():
    assert similar_lengths([9, 3, 10, 3], 8) == [[1, 3], [0, 2]]
    assert sorted(length_batches([3, 1, 2], 2, seed=0)) == [0, 1, 2]
