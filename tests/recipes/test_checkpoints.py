"""Runs that are cut, by a kill or a signal, and go on as if they had not been."""

import json
import os
import signal

import pytest
import torch
from conftest import letters
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, vowels
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_callback import ExportableState

from trl_instruct.errors import InputError
from trl_instruct.files import write_manifest
from trl_instruct.models.resuming import (
    all_checkpoints,
    check_resumable,
    find_checkpoint,
    is_finished,
)
from trl_instruct.ppo_trainer import trainer as ppo_trainer
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.rewards.combined import Normalised

pytestmark = pytest.mark.slow  # whole runs, cut and resumed

SAVING = {"save_strategy": "steps", "save_steps": 1}


def make_checkpoint(folder, step, whole=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "rng_state.pth", "run.json"):
        (checkpoint / name).write_text("{}")
    if whole:
        write_manifest(checkpoint)
    return checkpoint


# ---- which checkpoint ----------------------------------------------------------------------------


def test_the_last_whole_checkpoint_is_found(tmp_path, caplog):
    (tmp_path / "checkpoint-old").mkdir()
    made = [make_checkpoint(tmp_path, step) for step in (9, 10, 11)]
    half = make_checkpoint(tmp_path, 12, whole=False)
    (made[2] / "rng_state.pth").write_text("[]")
    assert all_checkpoints(tmp_path) == [*made, half]
    assert [is_finished(path) for path in [*made, half]] == [True, True, True, False]
    assert find_checkpoint(tmp_path, True) == find_checkpoint(tmp_path, "auto") == made[1]
    assert caplog.messages[0].startswith(f"{half} is passed over: it is incomplete")
    assert caplog.messages[1].endswith("rng_state.pth has changed since it was written.")
    assert find_checkpoint(tmp_path, str(made[0])) == made[0]
    with pytest.raises(InputError, match="checkpoint-12' cannot be resumed from: it is incomplete"):
        find_checkpoint(tmp_path, str(half))
    assert find_checkpoint(tmp_path / "elsewhere", "auto") is None


@pytest.mark.parametrize("checkpoint", [True, "elsewhere/checkpoint-3"])
def test_no_checkpoint_to_go_on_from(tmp_path, checkpoint):
    make_checkpoint(tmp_path, 3, whole=False)
    with pytest.raises(InputError, match="there is no whole checkpoint at"):
        find_checkpoint(tmp_path, checkpoint)


STEPS = {**QUICK, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused_and_stays(saved_policy, tmp_path):
    """Of another stage, of a full model for an adapter, of another model, a finished stage."""
    data, folder = Dataset.from_list(DEMONSTRATIONS), tmp_path / "sft"
    sft(saved_policy, data, folder, **STEPS)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    resume = {"resume_from_checkpoint": True}
    with pytest.raises(InputError, match="checkpoint-2' was made with stage sft, this run has rm"):
        rm(saved_policy, Dataset.from_list(RANKINGS), folder, eval_size=0, **STEPS, **resume)
    with pytest.raises(InputError, match="made with stage sft, this run has ppo"):
        ppo(saved_policy, vowels, Dataset.from_list(PROMPTS), folder, **QUICK_PPO, **resume)
    with pytest.raises(InputError, match="made with use_peft False, this run has True"):
        sft(saved_policy, data, folder, use_peft=True, **STEPS, **resume)
    finished = {"resume_from_checkpoint": str(folder)}
    with pytest.raises(InputError, match="is the result of a stage, not a checkpoint"):
        sft(saved_policy, data, tmp_path / "new", **STEPS, **finished)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    wide = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(saved_policy).config.__class__(
            vocab_size=258,
            max_position_embeddings=128,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            eos_token_id=256,
            pad_token_id=257,
        )
    )
    wide.config._name_or_path = str(saved_policy)  # whatever its name
    tokenizer = AutoTokenizer.from_pretrained(saved_policy)
    given = {"processing_class": tokenizer, **STEPS, "max_steps": 4, **resume}
    with pytest.raises(InputError, match="checkpoint-2' does not fit this run"):
        sft(wide, data, folder, **given)


def test_a_reward_models_checkpoint_is_known(tmp_path):
    """By what it remembers: sharded weights have no config. A trainer alone knows no stage."""
    (tmp_path / "run.json").write_text('{"run": {}}')
    check_resumable(tmp_path, "ppo", adapter=True)
    (tmp_path / "run.json").write_text('{"run": {"stage": "rm", "use_peft": false}}')
    check_resumable(tmp_path, "rm", adapter=False)
    with pytest.raises(InputError, match="made with stage rm, this run has sft"):
        check_resumable(tmp_path, "sft", adapter=False)
    with pytest.raises(InputError, match="made with use_peft False, this run has True"):
        check_resumable(tmp_path, "rm", adapter=True)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_removed_and_not_resumed_from(saved_policy, tmp_path):
    data = Dataset.from_list(DEMONSTRATIONS)
    sft(saved_policy, data, tmp_path / "run", **{**QUICK, **SAVING})
    half = tmp_path / "run" / "checkpoint-2"
    (half / "trainer_state.json").write_text("{")
    (half / "manifest.json").unlink()
    told = sft(
        saved_policy,
        data,
        tmp_path / "run",
        resume_from_checkpoint=True,
        **{**QUICK, "max_steps": 3},
    )
    assert not half.exists()
    logs = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3]
    assert told.metrics["seconds"] > 0


# ---- PPO goes on bit by bit ----------------------------------------------------------------------


class StepCounter(TrainerCallback, ExportableState):
    """Counts the iterations of the whole run."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def everything(trainer):
    """What a trainer has learned and counted, and its random numbers."""
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "schedule": trainer.lr_scheduler.state_dict(),
        "average": trainer.average.average,
        "random": torch.get_rng_state(),
        "callback": [
            c.state() for c in trainer.callback_handler.callbacks if type(c) is StepCounter
        ],
        "beta": trainer.kl_coef,
        "reward": list(trainer.reward.shared),
    }


def logs(trainer):
    return [
        {key: value for key, value in log.items() if key != "eps"}
        for log in trainer.state.log_history
    ]


def lora(policy):
    torch.manual_seed(7)
    return get_peft_model(policy, LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("wrap", [lambda policy: policy, lora], ids=["full", "lora"])
def test_resuming_is_bit_identical(make_trainer, make_policy, make_reward_model, wrap, at):
    """16 prompts, 8 an iteration: 1 and 3 lie within a pass over the prompts."""
    options = {
        "max_steps": 5,
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "adaptive_kl_target": 0.01,
        "adaptive_kl_horizon": 20,
        "ema_decay": 0.9,
        "ptx_coef": 0.1,
        "ptx_dataset": Dataset.from_dict({"text": [f"text {row}" for row in range(40)]}),
        "ptx_max_length": 8,
        "ptx_rows_per_episode": 1,
        "restore_callback_states_from_checkpoint": True,
    }

    def trainer(**more):
        return make_trainer(
            model=wrap(make_policy()), callbacks=[StepCounter()], **{**options, **more}
        )

    whole = trainer(reward_model=Normalised(letters))
    output = whole.train()
    cut = trainer(reward_model=Normalised(letters), **SAVING)

    class Cut(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == at

    cut.add_callback(Cut())
    cut.train()
    torch.rand(3)  # other random numbers than those the run stopped with
    other = make_reward_model(seed=5)
    resumed = trainer(reward_model=Normalised(letters), value_model=other)
    resumed_output = resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(everything(resumed), everything(whole), rtol=0, atol=0)
    assert logs(resumed) == logs(whole)
    assert resumed_output.metrics["objective/kl"] == output.metrics["objective/kl"]


def test_resuming_a_finished_run_changes_nothing(make_trainer):
    whole = make_trainer(max_steps=2, **SAVING)
    output = whole.train()
    again = make_trainer(max_steps=2)
    assert again.train(resume_from_checkpoint=True).metrics == output.metrics
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_mini_batches": 1}, "made with num_mini_batches 2, this run has 1"),
        ({"data_seed": 3}, "made with data_seed None, this run has 3"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["x"] * 16})}, "made with training data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(make_trainer, change, match):
    make_trainer(max_steps=1, **SAVING).train()
    with pytest.raises(InputError, match=match):
        make_trainer(max_steps=2, **change).train(resume_from_checkpoint=True)


def scored(values):
    """A reward that gives all completions of an iteration one score."""
    scores = iter(values)
    return lambda prompts, completions: [next(scores)] * len(completions)


def test_the_best_checkpoint_is_kept(make_trainer, tmp_path):
    """Iteration 3 measures what iteration 2 left; what the start scored (4) is no checkpoint's."""
    reward = scored([4.0, 1.0, 3.0, 2.0])
    options = {"max_steps": 4, "kl_coef": 0.0, "save_total_limit": 2, **SAVING}
    trainer = make_trainer(reward_model=reward, **options)
    trainer.train()
    kept = all_checkpoints(tmp_path / "ppo")
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-4"]
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (3.0, 2)
    assert trainer.state.best_model_checkpoint == str(kept[0])


def test_weights_without_a_checkpoint_are_not_the_best(make_trainer, tmp_path):
    """Iterations 2 and 4 measure weights that were never saved."""
    options = {"max_steps": 5, "kl_coef": 0.0, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(reward_model=scored([0.0, 9.0, 1.0, 8.0, 2.0]), **options)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (2.0, 4)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "ppo" / "checkpoint-4")


def test_the_best_checkpoint_holds_the_weights_that_were_measured(make_trainer, tmp_path):
    """They draw again, from the checkpoint's random numbers, what the metric was measured on."""
    drawn, options = [], {"max_steps": 4, "kl_coef": 0.0, "save_strategy": "best"}

    def reward(prompts, completions):
        drawn.append(completions)
        return [[5.0, 0.0, 2.0, 1.0][len(drawn) - 1]] * len(completions)

    trainer = make_trainer(reward_model=reward, **options)
    trainer.train()
    first, metrics = drawn[2], {}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "ppo" / "checkpoint-2")
    drawn[2:] = []

    class Once(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            metrics.setdefault(state.global_step, logs["objective/rlhf_reward"])

    again = make_trainer(reward_model=reward, callbacks=[Once()], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "ppo" / "checkpoint-2"))
    assert drawn[2] == first and metrics[3] == trainer.state.best_metric == 2.0
    torch.testing.assert_close(again.model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)


def test_only_what_is_better_is_saved(make_trainer, tmp_path):
    reward = Normalised(scored([5.0, 1.0, 0.0, 2.0]))  # its state is that of before, too
    options = {"max_steps": 4, "kl_coef": 0.0, "save_strategy": "best"}
    trainer = make_trainer(
        reward_model=reward, metric_for_best_model="objective/entropy", **options
    )
    trainer.train()
    entropies = [log["objective/entropy"] for log in trainer.state.log_history if "lr" in log]
    rising = [n for n in (1, 2, 3) if entropies[n] > max([0.0, *entropies[1:n]])]
    kept = all_checkpoints(tmp_path / "ppo")
    assert [path.name for path in kept] == [f"checkpoint-{n}" for n in rising]
    for path, step in zip(kept, rising, strict=True):
        state = json.loads((path / "ppo_state.json").read_text())["reward"][0]
        assert state["shared"][0] + state["own"][0] == 8 * step


def test_the_best_of_what(make_trainer):
    for name in ("reward", "objective/gold", "loss/policy"):
        with pytest.raises(InputError, match=f"'{name}', which a rollout does not measure: .*obj"):
            make_trainer(metric_for_best_model=name).train()


# ---- SIGKILL -------------------------------------------------------------------------------------


def die_in_call(monkeypatch, owner, name, count, halfway):
    """SIGKILL in the count-th call of a function, after what `halfway` does."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            halfway(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def half_a_state(state, path):
    with open(path, "w") as file:
        file.write('{"global_step": ')


def half_an_optimizer(state, path, **kwargs):
    with open(path, "wb") as file:
        file.write(b"PK")


def nothing(*args, **kwargs):
    pass


KILLS = {
    "within an iteration": (ppo_trainer, "rollout_scores", 3, nothing),
    "before the value model is saved": (PreTrainedModel, "save_pretrained", 4, nothing),
    "within the optimizer": (torch, "save", 4, half_an_optimizer),
    "within the last file": (TrainerState, "save_to_json", 2, half_a_state),
}


def in_child(work):
    """Run in a forked process; how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_resumed(saved_policy, saved_reward_model, tmp_path, monkeypatch, moment):
    prompts = Dataset.from_list(PROMPTS)
    options = {**QUICK_PPO, **SAVING, "max_steps": 4}

    def run(folder, **more):
        return ppo(saved_policy, saved_reward_model, prompts, folder, **{**options, **more})

    def killed():
        die_in_call(monkeypatch, *KILLS[moment])
        run(tmp_path / "cut")

    whole = run(tmp_path / "whole")
    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "metrics.json").exists()
    resumed = run(tmp_path / "cut", resume_from_checkpoint=True)
    first, second = (
        AutoModelForCausalLM.from_pretrained(result).state_dict() for result in (whole, resumed)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for last in ("optimizer.pt", "value_model/model.safetensors"):
        one, two = (path / "checkpoint-4" / last for path in (whole.path, resumed.path))
        assert one.read_bytes() == two.read_bytes()


# ---- SIGTERM -------------------------------------------------------------------------------------

STAGES = {
    "sft": lambda model, folder, **o: sft(model, Dataset.from_list(DEMONSTRATIONS), folder, **o),
    "rm": lambda model, folder, **o: rm(
        model, Dataset.from_list(RANKINGS), folder, eval_size=0, **o
    ),
    "ppo": lambda model, folder, **o: ppo(model, vowels, Dataset.from_list(PROMPTS), folder, **o),
}


@pytest.mark.parametrize("name", STAGES)
def test_sigterm_saves_and_exits(saved_policy, tmp_path, capsys, name):
    """The step in which the signal comes is finished; the stage does not count as done."""
    options = QUICK_PPO if name == "ppo" else QUICK
    options = {**options, "max_steps": 3}

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        STAGES[name](saved_policy, tmp_path / "x", callbacks=[Terminate()], **options)
    assert ended.value.code == 143
    assert "stopped by SIGTERM after step 2 of 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in all_checkpoints(tmp_path / "x")] == ["checkpoint-2"]
    assert not (tmp_path / "x" / "metrics.json").exists()
    STAGES[name](saved_policy, tmp_path / "x", resume_from_checkpoint=True, **options)
    state = json.loads((tmp_path / "x" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_the_signal_is_given_back_where_training_fails(saved_policy, tmp_path):
    def broken(prompts, completions):
        raise RuntimeError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InputError, match="raised RuntimeError"):
        ppo(saved_policy, broken, Dataset.from_list(PROMPTS), tmp_path / "x", **QUICK_PPO)
    assert signal.getsignal(signal.SIGTERM) is before
