import math
import statistics

import pytest
import torch

from trl_instruct.errors import InputError
from trl_instruct.ppo_trainer.roles import load_roles
from trl_instruct.rewards.combined import Bounded, Ensemble, WeightedSum, combined
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.reward_model import RewardModel

PROMPTS, COMPLETIONS = ["a ", "b ", "c "], ["x", "xx", "xxxxx"]


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def three(prompts, completions):
    return [3.0] * len(completions)


def long_alone(prompts, completions):
    return [4.0 if len(text) > 4 else None for text in completions]


def test_members_by_hand():
    """1, 2, 5 beside 3, 3, 3; a third member applies to the last text alone."""
    given = (PROMPTS, COMPLETIONS)
    assert Ensemble([length, three])(*given) == [2.0, 2.5, 4.0]
    assert Ensemble([length, three], "min")(*given) == [1.0, 2.0, 3.0]
    assert Ensemble([length, three, long_alone])(*given) == [2.0, 2.5, 4.0]
    found = Ensemble([length, three], "pessimistic", beta=0.5)(*given)
    expected = [-0.5 * math.log((math.exp(-2 * a) + math.exp(-6)) / 2) for a in (1, 2, 5)]
    assert found == pytest.approx(expected)
    assert Ensemble([length, three], "min").__name__ == "min of length, three"
    assert Ensemble([long_alone, long_alone])(*given) == [None, None, 4.0]


def test_pessimistic_lies_between_min_and_mean():
    scores = [0.3, -1.2, 2.0, 0.9]
    found = [combined(scores, "pessimistic", beta=beta) for beta in (1e-9, 0.1, 1.0, 10.0, 1e6)]
    assert found == sorted(found) and found[0] == pytest.approx(-1.2)
    assert found[-1] == pytest.approx(statistics.fmean(scores), abs=1e-5)
    wide = combined(scores, "pessimistic", beta=100.0)  # mean - variance / (2 beta)
    assert wide == pytest.approx(0.5 - statistics.pvariance(scores) / 200, abs=1e-4)
    assert combined([-1e6, 1e6], "pessimistic", beta=1e-3) == pytest.approx(-1e6)


def test_disagreement_is_told_as_trl_asks_for_it():
    told = {}
    Ensemble([length, three])(PROMPTS, COMPLETIONS, log_metric=told.__setitem__)
    assert told == {"disagreement": pytest.approx((1 + 0.5 + 1) / 3)}


def test_members_may_tell_too():
    def telling(prompts, completions, log_metric):
        log_metric("three", 3.0)
        return three(prompts, completions)

    told = {}
    Ensemble([length, telling])(PROMPTS, COMPLETIONS, log_metric=told.__setitem__)
    assert told.keys() == {"disagreement", "three"}


def test_ppo_logs_disagreement(make_trainer):
    """And what a reward inside another tells, and gold's."""

    def gold(prompts, completions, log_metric):
        log_metric("gold_length", 7.0)
        return length(prompts, completions)

    inner = Ensemble([length, three])
    trainer = make_trainer(reward_model=WeightedSum([inner, three]), max_steps=2)
    trainer.gold = gold
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert [log["objective/gold_length"] for log in logs] == [7.0, 7.0]
    assert all(log["objective/disagreement"] >= 0 for log in logs) and len(logs) == 2
    # |length - 3| / 2 on average; gold is the mean length.
    assert logs[0]["objective/disagreement"] >= abs(logs[0]["objective/gold"] - 3) / 2 - 1e-6
    assert logs[0]["objective/gold_se"] > 0


def test_bounded():
    assert Bounded(length)(PROMPTS, COMPLETIONS) == pytest.approx(
        torch.sigmoid(torch.tensor([1.0, 2.0, 5.0])).tolist()
    )
    assert Bounded(long_alone)(PROMPTS, COMPLETIONS)[:2] == [None, None]
    assert Bounded(length).__name__ == "bounded length"


def test_a_list_is_combined(saved_reward_model, tmp_path):
    given = ["a "], ["xxe"]
    reward = load_reward([length, three], combine="min")
    assert reward(*given) == [3.0] and isinstance(reward, Ensemble)
    assert load_reward([length, three], combine="pessimistic", combine_beta=9.0).beta == 9.0
    for options, message in (
        ({"combine": "min", "weights": [1.0, 2.0]}, "reward_weights are of a sum"),
        ({"combine": "min", "combine_beta": 1.0}, "combine_beta is of combine: pessimistic"),
        ({"combine": "max"}, "one of mean, min, pessimistic"),
    ):
        with pytest.raises(InputError, match=message):
            load_reward([length, three], **options)
    with pytest.raises(InputError, match="combine is for a list of rewards; one reward"):
        load_reward([length], combine="mean")
    with pytest.raises(InputError, match="at least two rewards"):
        Ensemble([length])


@pytest.mark.parametrize("as_object", [False, True])
def test_the_value_function_starts_from_the_first_member(
    saved_policy, saved_reward_model, tokenizer, ppo_config, as_object
):
    from trl import ModelConfig

    members = [str(saved_reward_model)] * 2
    reward = load_reward(members, combine="mean") if as_object else members
    config = ppo_config(combine=None if as_object else "mean")
    roles = load_roles(saved_policy, reward, None, tokenizer, config, ModelConfig())
    first = roles.reward.parts[0]
    assert isinstance(roles.reward, Ensemble) and isinstance(first, RewardModel)
    assert torch.equal(roles.value.score.weight, first.model.score.weight)
    assert roles.value is not first.model and roles.value.score.weight.requires_grad
