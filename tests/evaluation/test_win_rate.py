import math
import random

import pytest
import torch

from trl_instruct.data.ties import wins
from trl_instruct.evaluation.statistics import length_controlled, win_rate


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def contest():
    """Scores and lengths of two models on 200 prompts; longer ones score more, some are equal."""
    draw = random.Random(0)
    lengths = [[draw.randint(1, 60) for _ in range(200)] for _ in range(2)]
    scores = [
        [round(0.02 * n + draw.gauss(shift, 1)) for n in own]
        for own, shift in zip(lengths, (0.5, 0.0), strict=True)
    ]
    return *scores, *lengths


def test_a_tie_is_half_a_win():
    result = win_rate([1.0, 0.0, 5.0, 2.0], [0.0, 1.0, 5.0, 1.0], [3] * 4, [3] * 4)
    assert result["mean"] == (1 + 0 + 0.5 + 1) / 4


def test_two_large_scores_that_differ_by_little_are_no_tie():
    assert win_rate([1e8 + 1, 0.0], [1e8, 0.0], [3, 3], [3, 3])["mean"] == 0.75


def test_the_interval_is_wilsons():
    """60 wins of 100: 0.5020 to 0.6906."""
    result = win_rate([1.0] * 60 + [0.0] * 40, [0.5] * 100, [3] * 100, [3] * 100)
    found = [result[name] for name in ("mean", "low", "high")]
    assert found == pytest.approx([0.6, 0.5020, 0.6906], abs=5e-5)


def test_the_order_of_the_two_models_mirrors_everything(contest):
    ours, theirs, own, other = contest
    one, two = win_rate(ours, theirs, own, other), win_rate(theirs, ours, other, own)
    assert one["mean"] != 0.5
    for name, mirrored in (("mean", "mean"), ("low", "high"), ("high", "low")):
        assert one[name] == pytest.approx(1 - two[mirrored])
    assert one["length_controlled"] == pytest.approx(1 - two["length_controlled"])


# ---- at equal length -----------------------------------------------------------------------------


def test_where_length_explains_everything_one_half_is_left():
    """The longer one always wins, by as much above as below: theta is 0 by symmetry."""
    longer = tensor([-3.0, -1.0, 1.0, 3.0])
    assert length_controlled((longer.sign() + 1) / 2, longer) == pytest.approx(0.5)


def test_a_model_that_wins_by_being_longer_is_brought_to_one_half():
    """Longer on 900 prompts of 1000, it wins 9 of 10 where it is, and 1 of 10 where it is not."""
    longer = tensor([5.0] * 900 + [-5.0] * 100)
    won = tensor([1.0] * 810 + [0.0] * 90 + [1.0] * 10 + [0.0] * 90)
    assert won.mean() == 0.82
    assert length_controlled(won, longer) == pytest.approx(0.5, abs=0.02)
    lengths = [6] * 900 + [1] * 100, [1] * 900 + [6] * 100
    result = win_rate(won.tolist(), (1 - won).tolist(), *lengths)
    assert result["mean"] == pytest.approx(0.82)
    assert result["length_controlled"] == pytest.approx(length_controlled(won, longer))


def test_where_length_says_nothing_the_raw_rate_is_left():
    """Three of four win at each length: phi is 0, and theta solves 4 (3/4 - s(theta)) = theta / m
    for m copies of the four."""
    copies = 100
    longer = tensor([1.0] * 4 * copies + [-1.0] * 4 * copies)
    won = tensor([1.0, 1.0, 1.0, 0.0] * 2 * copies)
    found = length_controlled(won, longer)
    theta = math.log(found / (1 - found))
    assert 8 * copies * (0.75 - found) == pytest.approx(theta)
    assert found == pytest.approx(0.75, abs=2e-3)


def test_equal_lengths_have_no_slope():
    found = length_controlled(tensor([1.0, 1.0, 1.0, 0.0]), tensor([0.0] * 4))
    assert 4 * (0.75 - found) == pytest.approx(math.log(found / (1 - found)))
    assert length_controlled(tensor([1.0, 0.0]), tensor([7.0, 7.0])) == pytest.approx(0.5)


def test_the_fit_is_where_a_general_optimiser_finds_it(contest):
    ours, theirs, own, other = contest
    won, longer = wins(tensor(theirs), tensor(ours), ties="half"), tensor(own) - tensor(other)
    slope = torch.tanh(longer / longer.std(correction=0))
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12)

    def loss():
        optimizer.zero_grad()
        logits = weights[0] + weights[1] * slope
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, won, reduction="sum")
        total = entropy + 0.5 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    expected = torch.sigmoid(weights[0]).item()
    assert length_controlled(won, longer) == pytest.approx(expected)
    assert win_rate(*contest)["length_controlled"] == pytest.approx(expected)
    assert abs(expected - won.mean().item()) > 0.005  # length has a say here


@pytest.mark.parametrize("count", [1, 10, 10_000])
@pytest.mark.parametrize("apart", [0.0, 1.0, 1e6])
def test_data_that_can_be_separated_do_not_blow_up(count, apart):
    """All win; all win and are longer; the longer ones win."""
    won = torch.ones(count, dtype=torch.float64)
    longer = torch.arange(count, dtype=torch.float64) * apart
    assert 0.5 < length_controlled(won, longer) < 1
    middle = longer - longer.mean()
    assert length_controlled((middle.sign() + 1) / 2, middle) == pytest.approx(0.5)
