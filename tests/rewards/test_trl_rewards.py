"""TRL's own reward functions, as they ship in `trl.rewards`, behind every call of ours."""

import inspect
import json
import math

import pytest
import trl.rewards
from datasets import Dataset
from test_http import running
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from trl_instruct import HTTPReward, InputError, RewardServer, sample_candidates
from trl_instruct.rewards.combined import Clipped, Normalised, WeightedSum
from trl_instruct.rewards.function import RewardError, call_part, call_reward, try_reward

# Of max_completion_len 6, those of up to 4 tokens are free, and each further one costs a half.
OVERLONG = get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=2)
IDS = [[1] * 3, [1] * 5, [1] * 7]
COSTS = [0.0, -0.5, -1.0]
ASKED, TEXTS = ["a", "b", "c"], ["x", "yy", "zzz"]
# They compare an answer with a solution, through a parser of mathematics that is not ours.
NEEDS_OTHER_DATA = {"accuracy_reward", "reasoning_accuracy_reward", "get_cosine_scaled_reward"}


def half(prompts, completions, **columns):
    """Applies to every second completion."""
    return [float(len(text)) if row % 2 else None for row, text in enumerate(completions)]


def test_every_reward_of_trl_is_tested_here_or_needs_other_data():
    names = {name for name in trl.rewards.__all__ if inspect.isfunction(getattr(trl.rewards, name))}
    tested = {"get_soft_overlong_punishment", "think_format_reward"}
    assert names - NEEDS_OTHER_DATA - tested <= {"get_repetition_penalty_reward"}


def test_a_reward_of_tokens():
    columns = {"completion_ids": IDS, "other": [1, 2, 3]}
    assert call_reward(OVERLONG, ASKED, TEXTS, columns) == COSTS
    assert try_reward(OVERLONG, ASKED, TEXTS, columns) == (COSTS, {})
    total = WeightedSum([Clipped(OVERLONG, low=-0.75), Normalised(OVERLONG)], [2.0, 0.0])
    assert call_reward(total, ASKED, TEXTS, columns) == [0.0, -1.0, -1.5]


def test_the_penalty_of_repetitions():
    if not hasattr(trl.rewards, "get_repetition_penalty_reward"):
        pytest.skip(f"TRL {trl.__version__} has no get_repetition_penalty_reward")
    reward = trl.rewards.get_repetition_penalty_reward(ngram_size=2)
    # Of five bigrams of one token four repeat the first.
    columns = {"completion_ids": [[1, 2, 3], [7] * 6, []]}
    assert call_reward(reward, ASKED, TEXTS, columns) == [0.0, -0.8, 0.0]


def test_a_reward_of_messages():
    said = ["<think>hm</think>Yes.", "Yes.", "<think>a</think><think>b</think>"]
    given = [[{"role": "assistant", "content": text}] for text in said]
    asked = [[{"role": "user", "content": "?"}]] * 3
    columns = {"completion_ids": IDS}
    assert call_reward(think_format_reward, asked, given, columns) == [1.0, 0.0, 0.0]


def test_behind_a_server():
    with running(RewardServer(OVERLONG)) as server:
        reward = HTTPReward(server.url, retries=0, batch_size=2)
        assert call_reward(reward, ASKED, TEXTS, {"completion_ids": IDS}) == COSTS


def test_none_passes_through_a_server():
    with running(RewardServer(half)) as server:
        reward = HTTPReward(server.url, retries=0)
        assert call_part(reward, ASKED, TEXTS, {}) == [None, 2.0, None]


def test_what_ppo_gives_are_the_tokens_with_their_eos(make_trainer):
    """A punishment counts the EOS as TRL's does: of 8 tokens sampled, 2 are free of cost."""
    seen = []

    def watched(completion_ids, **columns):
        seen.extend(completion_ids)
        return OVERLONG(completion_ids)

    trainer = make_trainer(reward_model=watched, max_steps=1)
    trainer.begin_training()
    rows = [0, 1, 2]
    rollout = trainer.score(trainer.sample(rows), rows)
    assert list(map(len, seen)) == rollout.completion_lengths.tolist()
    assert rollout.scores.tolist() == OVERLONG(seen)
    ended = [ids[-1] in trainer.sampler.eos_token_ids for ids in seen]
    assert ended == rollout.ended.tolist()


@pytest.mark.slow
def test_a_labeler_that_goes_by_tokens(saved_policy, tmp_path):
    file = tmp_path / "c.jsonl"
    rows = Dataset.from_dict({"prompt": ["Q: "] * 3})
    options = {"response_length": 8, "labeler": list, "gold": OVERLONG, "seed": 1}
    sample_candidates(saved_policy, rows, file, **options)
    scores = [s for line in file.read_text().splitlines() for s in json.loads(line)["scores"]]
    assert {-1.0} < set(scores) <= {0.0, -0.5, -1.0}


def test_none_is_left_out_of_a_sum():
    total = WeightedSum([half, lambda prompts, completions: [1.0] * 3], [10.0, 1.0])
    assert call_reward(total, ASKED, TEXTS, {}) == [1.0, 21.0, 1.0]
    assert call_part(WeightedSum([half, half]), ASKED, TEXTS, {}) == [None, 4.0, None]
    assert call_part(Clipped(half, high=1.5), ASKED, TEXTS, {}) == [None, 1.5, None]


def test_none_is_no_part_of_the_moments():
    normalised = Normalised(half)
    asked, texts = list("abcd"), ["", "xx", "", "xxxx"]
    found = call_part(normalised, asked, texts, {})
    root = math.sqrt(2)  # of 2 and 4: mean 3, std root 2
    assert found == [None, pytest.approx(-1 / root), None, pytest.approx(1 / root)]
    assert normalised.own.seen == 2


def test_where_nothing_is_left_it_is_a_fault():
    with pytest.raises(RewardError, match=r"'half' gave the score None; .*\(completion 1\)"):
        call_reward(half, ASKED, TEXTS, {})
    scores, faults = try_reward(half, ASKED, TEXTS, {})
    assert scores[1] == 2.0 and list(map(math.isnan, scores)) == [True, False, True]
    assert list(faults) == [0, 2]


def test_a_reward_that_needs_another_column_says_so():
    def solved(prompts, completions, solution):
        return [0.0]

    message = r"'solved' needs the column `solution`, which is missing. It gets completion_ids,"
    with pytest.raises(InputError, match=message):
        call_reward(solved, ["a"], ["b"], {"completion_ids": [[1]]})
