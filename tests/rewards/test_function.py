"""What is told, and what is done, where a reward fails."""

import asyncio
import math
import sys
import threading

import numpy as np
import pytest
import torch

from trl_instruct.errors import InputError
from trl_instruct.rewards.combined import Clipped, TimeLimit, WeightedSum
from trl_instruct.rewards.function import (
    RewardError,
    RewardUnreachableError,
    as_text,
    call_reward,
    counts_of,
    try_reward,
)

PROMPTS = ["one ", "two ", "three ", "four "]
COMPLETIONS = ["a", "bb", "ccc", "dddd"]
COLUMNS = {"answer": ["w", "x", "y", "z"]}


class Lengths:
    """Fails as it is told to, for texts that hold a `c`; remembers how often it answered."""

    def __init__(self, fault):
        self.fault, self.answered, self.calls = fault, 0, []

    def __call__(self, prompts, completions, answer):
        self.calls.append(answer)
        self.answered += 1
        if self.fault is Exception and any("c" in text for text in completions):
            raise ValueError("no c, please")
        return [self.fault if "c" in text else float(len(text)) for text in completions]

    def state_dict(self):
        return {"answered": self.answered}

    def load_state_dict(self, state):
        self.answered = state["answered"]


def test_a_reward_that_raises_names_the_completion():
    reward = Lengths(Exception)
    with pytest.raises(RewardError, match="'Lengths' raised ValueError: no c, .*completion 3"):
        call_reward(reward, PROMPTS, COMPLETIONS, COLUMNS)
    assert reward.calls == [["w", "x", "y", "z"], ["w"], ["x"], ["y"]]
    assert reward.answered == 0
    with pytest.raises(InputError) as caught:
        call_reward(reward, PROMPTS, COMPLETIONS, COLUMNS)
    assert caught.value.row == 2
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_reward_that_raises_for_all_together_only():
    def moody(prompts, completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [1.0]

    with pytest.raises(RewardError, match="'moody' raised RuntimeError: too many$"):
        call_reward(moody, PROMPTS, COMPLETIONS, {})
    assert try_reward(moody, PROMPTS, COMPLETIONS, {}) == ([1.0] * 4, {})


@pytest.mark.parametrize("fault", [Exception, None, math.nan, math.inf, "good"])
def test_the_others_keep_their_scores(fault):
    reward = Lengths(fault)
    scores, faults = try_reward(reward, PROMPTS, COMPLETIONS, COLUMNS)
    assert math.isnan(scores[2])
    assert [*scores[:2], scores[3]] == [1.0, 2.0, 4.0]
    assert list(faults) == [2]
    assert "Lengths" in faults[2]
    assert reward.answered == 1  # calls that failed, and those that looked for why, leave no trace


@pytest.mark.parametrize("memory", [True, False])
def test_a_text_that_is_asked_about_again_is_counted_once(memory):
    """One of two parts counts what it cuts and has answered before the other fails."""

    class Cutting:
        truncated = 0

        def __call__(self, prompts, completions):
            self.truncated += sum(len(text) > 1 for text in completions)
            return [1.0] * len(completions)

    cutting, failing = Cutting(), Lengths(Exception)
    both = WeightedSum([cutting, failing] if memory else [cutting, no_c])
    _, faults = try_reward(both, PROMPTS, COMPLETIONS, COLUMNS)
    assert list(faults) == [2]
    assert cutting.truncated == 3 - memory  # of what is asked for together, without the fault
    with pytest.raises(RewardError):
        call_reward(both, PROMPTS, COMPLETIONS, COLUMNS)
    assert cutting.truncated == 3 - memory


def no_c(prompts, completions):
    return [{"ccc": math.nan}.get(text, 1.0) for text in completions]


def test_a_part_that_stands_twice_in_a_sum_counts_once():
    class Cutting:
        truncated = 0

        def __call__(self, prompts, completions):
            self.truncated += 1
            return [1.0] * len(completions)

    part = Cutting()
    both = WeightedSum([part, Clipped(part)])
    call_reward(both, PROMPTS, COMPLETIONS, {})
    assert sum(counts.get("truncated", 0) for counts in counts_of(both)) == 2


def test_a_fault_is_told_whatever_the_reward_calls_truncated():
    class Odd:
        truncated = property(lambda self: 3)

        def __call__(self, prompts, completions):
            raise ValueError("odd")

    with pytest.raises(RewardError, match="'Odd' raised ValueError: odd"):
        call_reward(Odd(), PROMPTS, COMPLETIONS, {})


def test_a_score_that_no_float32_holds():
    with pytest.raises(RewardError, match=r"gave the score 1e\+39.*completion 1"):
        call_reward(lambda prompts, completions: [1e39, 1.0], *["ab"] * 2, {})
    assert call_reward(lambda prompts, completions: [-3e38], ["a"], ["b"], {}) == [-3e38]


def test_a_wrong_count_is_asked_for_again_one_by_one():
    def forgetful(prompts, completions):
        return [1.0] * min(len(completions), 2)

    assert try_reward(forgetful, PROMPTS, COMPLETIONS, {}) == ([1.0] * 4, {})
    scores, faults = try_reward(lambda prompts, completions: [1.0, 2.0], *["ab"] * 2, {})
    assert (scores, faults) == ([1.0, 2.0], {})
    scores, faults = try_reward(lambda prompts, completions: 1.0, *["ab"] * 2, {})
    assert all(map(math.isnan, scores))
    assert "returned float for 1 completions" in faults[1]


def test_what_cannot_be_reached_is_not_asked_again():
    calls = []

    def away(prompts, completions):
        calls.append(len(completions))
        raise RewardUnreachableError("nobody there")

    with pytest.raises(RewardUnreachableError, match="nobody there"):
        call_reward(away, PROMPTS, COMPLETIONS, {})
    scores, faults = try_reward(away, PROMPTS, COMPLETIONS, {})
    assert calls == [4, 4]
    assert all(map(math.isnan, scores))
    assert faults == dict.fromkeys(range(4), "nobody there")

    def going(prompts, completions):
        calls.append(len(completions))
        if completions[0] == "bb":
            raise RewardUnreachableError("gone")
        if len(completions) > 1:
            raise ValueError
        return [1.0]

    scores, faults = try_reward(going, PROMPTS, COMPLETIONS, {})
    assert calls[2:] == [4, 1, 1]
    assert scores[0] == 1.0
    assert faults == dict.fromkeys((1, 2, 3), "gone")


async def slowly(prompts, completions, answer):
    await asyncio.sleep(0)
    return [float(ord(letter)) for letter in answer]


def test_an_async_function_with_columns():
    expected = [float(ord(letter)) for letter in "wxyz"]
    assert call_reward(slowly, PROMPTS, COMPLETIONS, COLUMNS) == expected

    async def in_a_notebook():
        return call_reward(slowly, PROMPTS, COMPLETIONS, COLUMNS)

    assert asyncio.run(in_a_notebook()) == expected

    async def failing(prompts, completions):
        raise ValueError("tired")

    with pytest.raises(RewardError, match="'failing' raised ValueError: tired .completion 1"):
        call_reward(failing, PROMPTS, COMPLETIONS, {})


def test_what_an_async_function_keeps_serves_all_calls():
    gate = asyncio.Semaphore(1)  # belongs to the event loop in which it first makes anyone wait

    async def one_at_a_time(prompts, completions):
        async def score(text):
            async with gate:
                await asyncio.sleep(0)
                return float(len(text))

        return await asyncio.gather(*map(score, completions))

    for _ in range(3):
        assert call_reward(one_at_a_time, PROMPTS, COMPLETIONS, {}) == [1.0, 2.0, 3.0, 4.0]


def test_an_async_function_that_calls_another():
    async def outer(prompts, completions):
        return call_reward(slowly, prompts, completions, COLUMNS)

    assert call_reward(outer, PROMPTS, COMPLETIONS, {}) == [119.0, 120.0, 121.0, 122.0]


def returning(scores):
    def reward(prompts, completions):
        return scores

    return reward


@pytest.mark.parametrize(
    ("scores", "returned"),
    [
        (torch.tensor(1.0), r"Tensor of shape \(\)"),
        (np.float64(1.0), r"float64 of shape \(\)"),
        (torch.ones(4, 2), r"Tensor of shape \(4, 2\)"),
        (np.ones((1, 4)), r"ndarray of shape \(1, 4\)"),
        (torch.ones(3), "3 scores"),
        (dict.fromkeys(range(4), 0.5), "dict"),
        ({0.5, 1, 2, 3}, "set"),
        ("1234", "str"),
        (b"1234", "bytes"),
        (0.5, "float"),
        (None, "NoneType"),
        ((0.5 for _ in range(4)), "generator"),
    ],
)
def test_what_is_no_list_of_scores(scores, returned):
    with pytest.raises(RewardError, match=f"'reward' returned {returned} for 4 completions"):
        call_reward(returning(scores), PROMPTS, COMPLETIONS, {})


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (10**400, "1000.*"),
        pytest.param(10**5000, "of type int", id="too many digits"),
        ("0.5", "'0.5'"),
        ([0.5], r"\[0.5\]"),
        (1j, "1j"),
        (torch.ones(2), r"tensor\(\[1., 1.\]\)"),
        ("\x1b[2J\u202e" * 1000, "'.*"),
    ],
)
def test_what_is_no_score(score, shown):
    with pytest.raises(RewardError, match=f"gave the score {shown}; .*completion 3") as told:
        call_reward(returning([1, 2, score, 4]), PROMPTS, COMPLETIONS, {})
    assert str(told.value).isprintable() and len(str(told.value)) < 200


@pytest.mark.parametrize("scores", [torch.ones(4).bfloat16(), np.arange(4), (True, 1, 0.5, 2)])
def test_what_is_a_list_of_scores(scores):
    expected = [float(score) for score in scores]
    assert call_reward(returning(scores), PROMPTS, COMPLETIONS, {}) == expected


def leaves(prompts, completions):
    sys.exit(0)


async def leaves_later(prompts, completions):
    sys.exit(0)


@pytest.mark.parametrize("reward", [leaves, leaves_later, TimeLimit(leaves, 5)])
def test_a_reward_that_leaves_does_not_end_the_run(reward):
    for _ in range(2):  # the loop of async rewards goes on
        with pytest.raises(RewardError, match="raised .*SystemExit: 0"):
            call_reward(reward, PROMPTS, COMPLETIONS, {})


def test_a_reward_that_never_returns():
    calls, for_ever = [], threading.Event()

    def stuck(prompts, completions):
        calls.append(len(completions))
        for_ever.wait()

    with pytest.raises(RewardUnreachableError, match="'stuck' did not return within 0.1 seconds"):
        call_reward(TimeLimit(stuck, 0.1), PROMPTS, COMPLETIONS, {})
    for_ever.set()
    assert calls == [4]  # and is not asked again for each completion
    with pytest.raises(InputError, match="must be above 0"):
        TimeLimit(stuck, 0)


def test_a_time_limit_changes_nothing_else():
    limited = TimeLimit(Lengths(math.nan), 5)
    assert call_reward(limited, PROMPTS[:2], ["a", "bb"], {"answer": ["w", "x"]}) == [1, 2]
    with pytest.raises(RewardError, match="'Lengths' gave the score nan.*completion 3"):
        call_reward(limited, PROMPTS, COMPLETIONS, COLUMNS)


def test_messages_as_text():
    assert as_text([{"role": "user", "content": "Name a city."}]) == "Name a city."
