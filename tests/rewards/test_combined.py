import json
import math

import pytest

from trl_instruct.errors import InputError
from trl_instruct.rewards.combined import Clipped, LengthPenalty, Normalised, WeightedSum
from trl_instruct.rewards.function import RewardError, load_states, states_of, try_reward

PROMPTS = ["a ", "b ", "c "]
COMPLETIONS = ["x", "xx", "xxxxx"]


def length(prompts, completions):
    return [float(len(text)) for text in completions]


async def bonus(prompts, completions, answer):
    return [10.0 * number for number in answer]


def test_a_weighted_sum_by_hand():
    reward = WeightedSum([length, bonus], [2.0, -0.5])
    assert reward(PROMPTS, COMPLETIONS, answer=[1, 2, 3]) == [2 - 5, 4 - 10, 10 - 15]
    assert reward.__name__ == "length + bonus"
    assert WeightedSum([length, length])(PROMPTS, COMPLETIONS) == [2.0, 4.0, 10.0]
    for rewards, weights in (([length], [1.0, 2.0]), ([], None)):
        with pytest.raises(InputError, match="one weight per reward"):
            WeightedSum(rewards, weights)


def test_the_part_that_fails_is_named():
    def moody(prompts, completions):
        return [1.0, math.nan, 1.0]

    with pytest.raises(RewardError, match="'moody' gave the score nan.*completion 2"):
        WeightedSum([length, moody])(PROMPTS, COMPLETIONS)


def test_clipping():
    assert Clipped(length, low=2, high=4)(PROMPTS, COMPLETIONS) == [2, 2, 4]
    assert Clipped(length, high=3)(PROMPTS, COMPLETIONS) == [1, 2, 3]
    with pytest.raises(InputError, match=r"\[2, 1\]: low is above high"):
        Clipped(length, low=2, high=1)


def test_a_length_penalty_counts_the_text_of_messages():
    penalty = LengthPenalty(0.5, free=1)
    assert penalty(PROMPTS, COMPLETIONS) == [0.0, -0.5, -2.0]
    assert penalty([[]], [[{"role": "assistant", "content": "xxx"}]]) == [-1.0]


def test_normalised_by_all_scores_so_far():
    """1, 2, 5: mean 8/3, squares 26/3; with a 4: mean 3, squares 10."""
    reward = Normalised(length)
    std = math.sqrt(26 / 3 / 2)
    expected = [(score - 8 / 3) / std for score in (1, 2, 5)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected)
    assert reward(["d "], ["xxxx"]) == pytest.approx([1 / math.sqrt(10 / 3)])
    assert Normalised(length)(["a"], ["xx"]) == [0.0]
    assert Normalised(length)(["a"] * 2, ["xx"] * 2) == [0.0, 0.0]


def test_what_was_seen_survives_as_json():
    def build():
        return WeightedSum([Clipped(Normalised(length), high=1.0), Normalised(length)])

    reward, resumed = build(), build()
    reward(PROMPTS, COMPLETIONS)
    load_states(resumed, json.loads(json.dumps(states_of(reward))))
    given = (["d "], ["xxxx"])
    assert resumed(*given) == reward(*given)
    assert build()(*given) != resumed(*given)


def test_processes_share_what_they_saw():
    """Two that saw 1, 2 and 5: as one that saw all three, from the next call on."""
    one, two, all_ = Normalised(length), Normalised(length), Normalised(length)
    one(PROMPTS[:2], COMPLETIONS[:2])
    two(PROMPTS[2:], COMPLETIONS[2:])
    all_(PROMPTS, COMPLETIONS)
    states = [one.state_dict(), two.state_dict()]
    for reward in (one, two):
        reward.merge(states)
        reward.merge([reward.state_dict()] * 2)  # nothing new
    all_.merge([all_.state_dict()])
    assert one.state_dict() == two.state_dict()
    given = (["d "], ["xxxx"])
    assert one(*given) == pytest.approx(all_(*given))


def _raises(prompts, completions):
    if "xx" in completions:
        raise ValueError
    return [0.0 for _ in completions]


def _skips(prompts, completions):
    return [math.nan if text == "xx" else float(len(text)) for text in completions]


@pytest.mark.parametrize("parts", [[Normalised(length), _raises], [Normalised(_skips)]])
def test_a_skipped_score_leaves_the_others_normalised_together(parts):
    scores, faults = try_reward(WeightedSum(parts), PROMPTS, COMPLETIONS, {})
    assert list(faults) == [1] and math.isnan(scores[1])
    assert [scores[0], scores[2]] == pytest.approx([-2 / 8**0.5, 2 / 8**0.5])  # of 1 and 5
    assert parts[0].state_dict()["own"] == [2, 3.0, 8.0]
