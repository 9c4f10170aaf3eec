"""A reward that fails in the middle of a run."""

import json
import math
import threading
import time

import pytest
import torch
from test_http import serve_reward

from trl_instruct.errors import InputError
from trl_instruct.ppo_trainer.rollout_scores import rollout_scores
from trl_instruct.rewards.combined import Normalised, WeightedSum
from trl_instruct.rewards.function import RewardError, states_of
from trl_instruct.rewards.http import HTTPReward

pytestmark = pytest.mark.slow  # whole runs


def letters(prompts, completions):
    return [text.count("e") + 0.1 * len(text) for text in completions]


class Failing:
    """`letters`, but for the call with this number, from 1, and prompts that hold a text."""

    def __init__(self, fault, *, call, text=""):
        self.fault, self.call, self.text, self.calls = fault, call, text, 0

    def __call__(self, prompts, completions):
        self.calls += len(prompts) > 1
        scores = letters(prompts, completions)
        if self.calls != self.call:
            return scores
        hit = [row for row, prompt in enumerate(prompts) if self.text in prompt]
        if hit and isinstance(self.fault, Exception):
            raise self.fault
        if self.fault == "count":
            return scores[1:]
        for row in hit if not isinstance(self.fault, Exception) else ():
            scores[row] = self.fault
        return scores


def final(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            ValueError("too rude"),
            "'Failing' raised ValueError: too rude .prompt [0-9]+ of",
        ),
        (
            math.nan,
            "'Failing' gave the score nan; .*prompt [0-9]+ of the dataset: '.*prompt 1[0-9]*: '",
        ),
        (math.inf, "'Failing' gave the score inf; .*prompt [0-9]+ of"),
        ("count", "'Failing' returned 7 scores for 8 completions"),
    ],
)
def test_the_third_iteration_fails(make_trainer, tmp_path, fault, message):
    """What is named, what is saved, and that the run goes on as if nothing had been."""

    def trainer(reward, **options):
        normalised = WeightedSum([Normalised(letters), reward])
        return make_trainer(reward_model=normalised, max_steps=4, **options)

    whole = trainer(letters)
    whole.train()
    failing = trainer(
        Failing(fault, call=3, text="prompt 1"), output_dir=str(tmp_path / "run"), save_steps=100
    )
    with pytest.raises(InputError, match=f"^Iteration 3: Reward {message}") as told:
        failing.train()
    assert "checkpoint-2 holds the run as it was before" in str(told.value)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    resumed = trainer(letters, output_dir=str(tmp_path / "run"))
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(final(resumed), final(whole), rtol=0, atol=0)


def test_a_reward_that_fails_has_seen_nothing():
    reward = WeightedSum([Normalised(letters), Failing(ValueError("x"), call=2)])
    given = (reward, ["p"] * 2, ["see", "me too"], {})
    rollout_scores(*given, rows=[0, 1], skip=False)
    before = states_of(reward)
    assert before
    with pytest.raises(RewardError, match="ValueError: x"):
        rollout_scores(*given, rows=[0, 1], skip=False)
    assert states_of(reward) == before


def test_none_is_left_out_of_a_sum_and_is_a_fault_where_nothing_is_left(make_trainer):
    """As in TRL, where None is "does not apply"; there a row of nothing but None is a warning."""
    alone = Failing(None, call=1, text="prompt 1")
    with pytest.raises(InputError, match="'Failing' gave the score None; .*prompt [0-9]+ of"):
        make_trainer(reward_model=alone, max_steps=2).train()
    beside = WeightedSum([Failing(None, call=1, text="prompt 1"), letters], [2.0, 1.0])
    trainer = make_trainer(reward_model=beside, max_steps=1)
    trainer.begin_training()
    rows = list(range(8, 16))  # prompts 10 to 15 have no score of the first
    rollout = trainer.sample(rows)
    texts = rollout.texts(trainer.processing_class, None)
    weights = torch.tensor([3.0] * 2 + [1.0] * 6)
    expected = torch.tensor(letters(None, texts)) * weights
    torch.testing.assert_close(trainer.score(rollout, rows).scores, expected)


def test_nothing_is_saved_before_the_first_iteration(make_trainer, tmp_path):
    trainer = make_trainer(reward_model=Failing(math.nan, call=1), max_steps=2)
    with pytest.raises(InputError, match="^Iteration 1: .*prompt [0-9]+: '.$"):
        trainer.train()
    assert not list((tmp_path / "ppo").glob("checkpoint-*"))


def test_a_checkpoint_that_was_resumed_from_is_not_written_again(make_trainer, tmp_path):
    options = {"max_steps": 2, "output_dir": str(tmp_path / "run")}
    make_trainer(save_strategy="steps", save_steps=1, **{**options, "max_steps": 1}).train()
    (folder,) = (tmp_path / "run").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def broken(prompts, completions):
        raise RuntimeError

    with pytest.raises(InputError, match="checkpoint-1 holds the run as it was before"):
        make_trainer(reward_model=broken, **options).train(resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("fault", [ValueError("x"), math.nan, None])
def test_a_skipped_episode_counts_nowhere(make_trainer, fault):
    """Advantages, losses, gradients and metrics are those of the others alone."""
    trainer = make_trainer(on_error="skip", whiten_rewards=True, num_mini_batches=1)
    trainer.reward = Failing(fault, call=1, text="prompt 1")
    trainer.begin_training()
    trainer.started = time.perf_counter()
    rows = list(range(8, 16))  # prompts 10 to 15 fail
    rollout = trainer.score(trainer.sample(rows), rows)
    assert rollout.scored.tolist() == [True, True] + [False] * 6
    assert trainer.skipped == 6
    kept = rollout.select(torch.tensor([0, 1]))
    measured = {}
    for name, episodes in (("all", rollout), ("kept", kept)):
        rewards, kl = trainer.rewards(episodes)
        advantages, returns = trainer.advantages(episodes, rewards)
        assert advantages.isfinite().all() and returns.isfinite().all()
        measured[name] = [advantages, returns, trainer.measure(episodes, kl, returns)]
    (a, r, metrics), (a_kept, r_kept, expected) = measured["all"], measured["kept"]
    torch.testing.assert_close((a[:2], r[:2]), (a_kept, r_kept))
    assert not a[2:].any() and not r[2:].any()
    assert metrics.pop("objective/skipped") == expected.pop("objective/skipped") == 6
    assert metrics == pytest.approx(expected)
    start = final(trainer)
    stats = trainer.step(rollout, a, r)
    after = final(trainer)
    trainer.model.load_state_dict(start)
    trainer.optimizer.state.clear()
    assert trainer.step(kept, a_kept, r_kept) == pytest.approx(stats, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(final(trainer), after, rtol=1e-4, atol=1e-6)


def test_a_minibatch_of_skipped_episodes_is_no_step(make_trainer):
    trainer = make_trainer(on_error="skip")
    trainer.begin_training()
    rollout = trainer.sample(list(range(8)))
    rollout = rollout._replace(scores=torch.tensor([1.0] * 4 + [math.nan] * 4))
    trainer.skipped = 4
    trainer.minibatches = lambda: torch.arange(8).split(4)
    rewards, _ = trainer.rewards(rollout)
    stats = trainer.update(rollout, *trainer.advantages(rollout, rewards))
    assert stats["policy/steps"] == 1
    assert all(map(math.isfinite, stats.values()))


def test_a_run_that_skips_goes_on_and_counts(make_trainer):
    reward = Failing(math.nan, call=2, text="prompt 1")
    trainer = make_trainer(reward_model=reward, on_error="skip", max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/skipped" in log]
    skipped = [log["objective/skipped"] for log in logs]
    assert skipped[0] == skipped[2] == 0 < skipped[1] < 8
    assert all(math.isfinite(value) for log in logs for value in log.values())
    with pytest.raises(InputError, match="nan; .*, and 7 more"):
        make_trainer(reward_model=Failing(math.nan, call=1), on_error="skip").train()


def test_a_judge_that_is_not_trained_on_may_fail(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.gold = Failing(ValueError("asleep"), call=2)
    with pytest.warns(UserWarning, match="Iteration 2, gold: Reward 'Failing' raised .* asleep"):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert ["objective/gold" in log for log in logs] == [True, False, True]
    gold = {"metric_for_best_model": "objective/gold", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(max_steps=3, save_total_limit=1, **gold)
    trainer.gold = Failing(ValueError("asleep"), call=2)
    with pytest.warns(UserWarning, match="Iteration 2, gold: Reward 'Failing' raised .* asleep"):
        trainer.train()
    assert trainer.state.best_global_step == 2  # iteration 3 measured it; nobody measured 1
    trainer = make_trainer(max_steps=1)
    trainer.gold = Failing(math.nan, call=1, text="prompt 1")
    trainer.train()
    log = next(log for log in trainer.state.log_history if "objective/gold" in log)
    assert math.isfinite(log["objective/gold"]) and 0 < log["objective/gold_failed"] < 8


def test_a_fixed_score_without_eos(make_trainer):
    trainer = make_trainer(missing_eos_score=-5.0, on_error="skip", max_steps=1)
    rows = list(range(8))
    rollout = trainer.sample(rows)
    rollout = rollout._replace(ended=torch.arange(8) < 3)
    scores = trainer.score(rollout, rows).scores
    assert scores[3:].tolist() == [-5.0] * 5
    assert (scores[:3] >= 0).all()
    trainer.reward = Failing(math.nan, call=1, text="prompt 7")
    assert trainer.score(rollout, rows).scores.isnan().tolist() == [False] * 7 + [True]
    with pytest.raises(InputError, match="exclude each other"):
        make_trainer(missing_eos_score=-5.0, missing_eos_penalty=1.0)


def test_what_normalisation_has_seen_is_saved(make_trainer, tmp_path):
    trainer = make_trainer(reward_model=Normalised(letters), max_steps=1, save_strategy="steps")
    trainer.args.save_steps = 1
    trainer.train()
    (state,) = json.loads((tmp_path / "ppo" / "checkpoint-1" / "ppo_state.json").read_text())[
        "reward"
    ]
    assert state["shared"][0] == 8 and state["own"][0] == 0
    with pytest.raises(InputError, match="the state of 1 rewards, but 0 of this run have state"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(tmp_path / "ppo/checkpoint-1"))


def test_a_server_killed_in_the_middle_of_a_rollout(make_trainer, tmp_path):
    """It comes back, and the run ends as one that was never cut."""
    file = tmp_path / "rules.py"
    file.write_text(
        "def letters(prompts, completions):\n"
        "    return [text.count('e') + 0.1 * len(text) for text in completions]\n"
    )
    whole = make_trainer(reward_model=letters, max_steps=3)
    whole.train()
    arguments = ["--reward_model_path", f"{file}:letters", "--port"]
    second = []
    with serve_reward(*arguments, 0) as (process, line):
        url = line.rpartition(" ")[2].strip()
        port = url.rpartition(":")[2].partition("/")[0]
        remote = HTTPReward(url, batch_size=4, retries=8)
        calls = []
        original = remote._ask

        def restart():
            time.sleep(2)
            server = serve_reward(*arguments, port)
            second.append(server)
            server.__enter__()

        def ask(batch):
            calls.append(len(batch["prompts"]))
            if len(calls) == 4:  # the second half of the second rollout
                process.kill()
                process.wait()
                threading.Thread(target=restart).start()
            return original(batch)

        remote._ask = ask
        try:
            trainer = make_trainer(reward_model=remote, max_steps=3)
            trainer.train()
        finally:
            for server in second:
                server.__exit__(None, None, None)
    assert calls == [4] * 6
    torch.testing.assert_close(final(trainer), final(whole), rtol=0, atol=0)
