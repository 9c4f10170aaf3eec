"""A run of PPO from its first iteration to its last: seeds, callbacks, logs, saving, learning."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback


def weights(trainer):
    """Weights of policy and value after training."""
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(make_trainer):
    first, second = (weights(make_trainer(max_steps=2)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    other = weights(make_trainer(max_steps=2, seed=1))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_data_seed_0_is_a_seed(make_trainer):
    orders = [list(make_trainer(data_seed=seed).prompt_batches()) for seed in (0, None)]
    assert orders[0] != orders[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "iterations"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": -1, "total_episodes": 17}, 3),
        ({"max_steps": -1, "num_train_epochs": 1}, 2),
    ],
)
def test_how_long_a_run_is(make_trainer, options, iterations):
    output = make_trainer(**options).train()
    assert output.global_step == iterations
    assert output.metrics["episode"] == 8 * iterations


class Recorder(TrainerCallback):
    def __init__(self, stop_after=None):
        self.calls, self.stop_after = [], stop_after

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls.append("begin")

    def on_step_begin(self, args, state, control, **kwargs):
        self.calls.append(f"step {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.stop_after

    def on_epoch_end(self, args, state, control, **kwargs):
        self.calls.append(f"epoch {state.epoch}")

    def on_train_end(self, args, state, control, **kwargs):
        self.calls.append("end")


@pytest.mark.slow
def test_callbacks_are_told_and_can_stop(make_trainer):
    recorder = Recorder()
    make_trainer(max_steps=4, callbacks=[recorder]).train()
    steps = ["step 0", "step 1", "epoch 1.0", "step 2", "step 3", "epoch 2.0"]
    assert recorder.calls == ["begin", *steps, "end"]
    recorder = Recorder(stop_after=1)
    assert make_trainer(max_steps=4, callbacks=[recorder]).train().global_step == 1
    assert recorder.calls == ["begin", "step 0", "end"]


@pytest.mark.slow
def test_every_metric_is_logged_and_the_last_is_the_result(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=2)
    output = trainer.train()
    assert [log["step"] for log in trainer.state.log_history] == [2]
    assert output.metrics["episode"] == 24
    assert set(output.metrics) == {
        *(f"objective/{name}" for name in ("kl", "kl_k3", "entropy", "rlhf_reward")),
        *(f"objective/{name}" for name in ("non_score_reward", "scores", "length", "ended")),
        *(f"policy/{name}" for name in ("approxkl", "clipfrac", "entropy")),
        *(f"loss/{name}" for name in ("policy", "value")),
        *(f"val/{name}" for name in ("clipfrac", "mean", "explained_variance")),
        *("val/ratio", "val/ratio_var", "policy/steps", "objective/kl_coef"),
        *("lr", "eps", "episode", "epoch", "grad_norm"),
    }
    assert all(math.isfinite(value) for value in output.metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant_with_warmup", [0.5, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 2 / 3, 1 / 3])],
)
def test_the_learning_rate_follows_the_iterations(make_trainer, schedule, rates):
    """Never 0: such an iteration would be sampled for nothing (InstructGPT: from a tenth)."""
    trainer = make_trainer(
        max_steps=4, warmup_steps=2, lr_scheduler_type=schedule, learning_rate=1.0
    )
    trainer.train()
    logged = [log["lr"] for log in trainer.state.log_history]
    assert logged == pytest.approx(rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "folders"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, ["checkpoint-2", "checkpoint-3"]),
        ({"save_strategy": "epoch"}, ["checkpoint-2"]),
    ],
)
def test_checkpoints_load_with_plain_transformers(make_trainer, tmp_path, options, folders):
    trainer = make_trainer(max_steps=3, **options)
    trainer.train()
    saved = sorted((tmp_path / "ppo").glob("checkpoint-*"))
    assert [folder.name for folder in saved] == folders
    loaded = AutoModelForCausalLM.from_pretrained(saved[-1])
    assert (saved[-1] / "tokenizer.json").is_file()
    if folders[-1] == "checkpoint-3":
        ours = trainer.policy.state_dict()
        torch.testing.assert_close(loaded.state_dict(), ours, rtol=0, atol=0)
    trainer.save_model(tmp_path / "final")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    own = trainer.policy.generation_config.eos_token_id
    assert final.generation_config.eos_token_id == own
    assert not (tmp_path / "final" / "value_model").exists()


LEARNING = {
    "per_device_train_batch_size": 16,
    "num_mini_batches": 2,
    "response_length": 8,
    "learning_rate": 0.01,
}


def logged(trainer, name):
    """A metric in each iteration of a run."""
    trainer.train()
    return [log[name] for log in trainer.state.log_history if name in log]


def vowels(prompts, completions):
    return [float(sum(map(text.count, "aeiou"))) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_toy_reward_is_learned(make_trainer, kind):
    """5 of 258 tokens are vowels: chance makes less than 0.16 in 8 tokens, PPO more than 5."""
    trainer = make_trainer(kind, reward_model=vowels, kl_coef=0.01, max_steps=40, **LEARNING)
    scores = logged(trainer, "objective/scores")
    assert sum(scores[:3]) / 3 < 0.5
    assert sum(scores[-3:]) / 3 > 5.0


@pytest.mark.slow
def test_the_kl_penalty_pulls_the_policy_to_the_reference(make_trainer, make_policy):
    """Where there is nothing else to earn, the KL is at least halved."""
    trainer = make_trainer(
        reward_model=lambda prompts, completions: [0.0] * len(completions),
        ref_model=make_policy(seed=5),
        kl_coef=1.0,
        max_steps=60,
        **LEARNING,
    )
    kl = logged(trainer, "objective/kl")
    assert sum(kl[-10:]) / 10 < 0.5 * sum(kl[:3]) / 3
