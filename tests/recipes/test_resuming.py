"""What a resumed run may change, what it refuses, and what is never saved."""

import dataclasses
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from trl_instruct.cli import main
from trl_instruct.configs import PPOConfig, PretrainConfig, RewardConfig, SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.models.resuming import MAY_CHANGE, all_checkpoints, check_same_run
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.pretrain import pretrain
from trl_instruct.recipes.progress import ProgressBar, way_on
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft

SAVING = {"save_strategy": "steps", "save_steps": 1}
STAGES = {"sft": SFTConfig, "rm": RewardConfig, "ppo": PPOConfig, "pretrain": PretrainConfig}


def rates(folder):
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {log["step"]: log["learning_rate"] for log in logs if "learning_rate" in log}


# ---- every option --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_takes_effect_or_is_refused_and_the_table_says_which(stage):
    """docs/resume.md names each option that may change; any other change is an error."""
    rows = Path("docs/resume.md").read_text(encoding="utf-8").split("| option |")[1]
    rows = [row for row in rows.split("\n\n")[0].splitlines() if row.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`([\w*]+)`", row.split("|")[1])}
    assert told == set(MAY_CHANGE.split())
    fields = {f.name for kind in (STAGES[stage], ModelConfig) for f in dataclasses.fields(kind)}
    allowed = {name for name in fields if any(fnmatch(name, pattern) for pattern in told)}
    assert len(allowed) > 50 and len(fields - allowed) > 70
    for name in fields - allowed:
        with pytest.raises(InputError, match=f"made with {name} 1, this run has 2. Resume with"):
            check_same_run({"kl": 0, name: 1}, {"kl": 0, name: 2}, Path("checkpoint-1"))


def test_what_may_change_is_an_option_and_not_in_what_is_compared():
    known = {f.name for kind in STAGES.values() for f in dataclasses.fields(kind)}
    for pattern in MAY_CHANGE.split():
        names = [name for name in known if fnmatch(name, pattern)]
        assert names, pattern
        check_same_run(dict.fromkeys(names, 1), dict.fromkeys(names, 2), Path("checkpoint-1"))


@pytest.fixture(scope="module")
def sft_run(saved_policy, tmp_path_factory):
    """The folder of a run of three steps of a pass of eight, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("resuming") / "sft"
    options = {**QUICK, **SAVING, "per_device_train_batch_size": 1, "max_steps": 3}
    options |= {"lr_scheduler_type": "linear", "learning_rate": 1e-3}
    sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), folder, **options)
    return folder, options


def resume(saved_policy, run, folder, *, at=2, rows=DEMONSTRATIONS, **changed):
    """A run in another folder from one of its checkpoints, with changed options."""
    source, options = run
    options = {**options, "resume_from_checkpoint": str(source / f"checkpoint-{at}"), **changed}
    return sft(saved_policy, Dataset.from_list(rows), folder, **options).path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 3}, "made with seed 42, this run has 3"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 1, this run has 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1, this run has 2"),
        ({"optim": "sgd"}, "made with optim adamw_torch.*, this run has sgd"),
        ({"weight_decay": 0.5}, "made with weight_decay 0.0, this run has 0.5"),
        ({"attn_implementation": "eager"}, "attn_implementation None, this run has eager"),
        ({"rows": DEMONSTRATIONS[::-1]}, "made with training data [0-9a-f]{16}, this run has"),
        ({"max_steps": 1}, "is of step 2, but this run has 1 in all"),
    ],
)
def test_another_run_is_refused(saved_policy, sft_run, tmp_path, change, match):
    with pytest.raises(InputError, match=match):
        resume(saved_policy, sft_run, tmp_path / "x", **change)


@pytest.mark.slow
def test_rates_lengths_logging_and_saving_take_effect(saved_policy, sft_run, tmp_path):
    """A linear schedule over 5 steps instead of 3, from twice the rate, at its third step."""
    assert rates(sft_run[0]) == pytest.approx({1: 1e-3, 2: 1e-3 * 2 / 3, 3: 1e-3 / 3})
    change = {"learning_rate": 2e-3, "max_steps": 5, "logging_steps": 3, "save_steps": 4}
    folder = resume(saved_policy, sft_run, tmp_path / "x", **change)
    assert rates(folder) == pytest.approx({1: 1e-3, 2: 1e-3 * 2 / 3, 3: 2e-3 * 3 / 5})
    assert [path.name for path in all_checkpoints(folder)] == [
        f"checkpoint-{step}" for step in (4, 5)
    ]


@pytest.mark.slow
def test_rates_and_kl_coef_of_ppo_take_effect(make_trainer):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 0, "gradient_checkpointing": False}
    whole = make_trainer(**options, max_steps=2, learning_rate=1e-4, kl_coef=0.1, **SAVING)
    whole.train()
    assert whole.metrics["objective/kl_coef"] == 0.1
    change = {"learning_rate": 2e-4, "value_learning_rate": 4e-4, "kl_coef": 0.5, "max_steps": 4}
    resumed = make_trainer(**options, **change)
    seen = []
    resumed.log = lambda metrics, *rest: seen.append(
        (metrics["objective/kl_coef"], *sorted({g["lr"] for g in resumed.optimizer.param_groups}))
    )
    resumed.train(resume_from_checkpoint=True)
    # One step ahead of the Trainer's schedule: after the third of 5 steps 1/5 is left.
    assert seen[0] == pytest.approx((0.5, 2e-4 / 5, 4e-4 / 5))
    assert resumed.metrics["lr"] == pytest.approx(2e-4 / 5)


# ---- whole checkpoints ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(saved_policy, sft_run, tmp_path, caplog):
    """A bit of the optimizer, a missing config: no model is built from it, not of 7B either."""
    whole, options = sft_run
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    (folder / "metrics.json").unlink()
    optimizer = folder / "checkpoint-3" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    (folder / "checkpoint-2" / "config.json").unlink()
    named = {"resume_from_checkpoint": str(folder / "checkpoint-2")}
    with pytest.raises(InputError, match="cannot be resumed from: config.json is missing"):
        sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), folder, **options, **named)
    resumed = resume_in(saved_policy, folder, options)
    assert "checkpoint-3 is passed over: optimizer.pt has changed" in caplog.text
    assert "checkpoint-2 is passed over: config.json is missing" in caplog.text
    one, two = (AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (whole, resumed))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def resume_in(saved_policy, folder, options, how=True):
    given = {**options, "resume_from_checkpoint": how}
    return sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), folder, **given)


@pytest.mark.slow
def test_auto_goes_on_or_begins(saved_policy, sft_run, tmp_path):
    """Nothing, leftovers of a run that was killed, a checkpoint, a finished run without one."""
    _, options = sft_run
    options = {**options, "save_steps": 2}
    folder = tmp_path / "x"
    assert resume_in(saved_policy, folder, options, "auto").metrics["train_loss"] > 0
    (folder / "metrics.json").unlink()
    for checkpoint in all_checkpoints(folder):
        (checkpoint / "manifest.json").unlink()
    again = resume_in(saved_policy, folder, {**options, "save_strategy": "no"}, "auto")
    assert sorted(rates(again.path)) == [1, 2, 3]
    assert not all_checkpoints(folder)
    with pytest.raises(InputError, match="holds another run"):
        resume_in(saved_policy, folder, options, "auto")
    other = shutil.copytree(sft_run[0], tmp_path / "y")
    (other / "metrics.json").unlink()
    shutil.rmtree(other / "checkpoint-3")
    assert sorted(rates(resume_in(saved_policy, other, options, "auto").path)) == [1, 2, 3]


def command(saved_policy, tmp_path, **changed):
    """Arguments of a short run of sft with checkpoints."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DEMONSTRATIONS)))
    options = {**QUICK, "output_dir": tmp_path / "x", "dataset_name": data, **changed}
    options |= {"model_name_or_path": saved_policy}
    return ["sft", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.slow
@pytest.mark.parametrize("saving", ["no", "steps"])
def test_a_finished_run_that_is_resumed_says_so(saved_policy, tmp_path, capsys, saving):
    """Nothing is trained or written; with other options, or other data, it is another run."""
    given = command(saved_policy, tmp_path, save_strategy=saving, save_steps=1)
    main(given)
    assert "is finished" not in capsys.readouterr().out
    files = [path for path in (tmp_path / "x").rglob("*.*") if path.is_file()]
    before = {path: path.read_bytes() for path in files if path.name != "report.html"}
    for how in ["auto"] if saving == "no" else ["auto", "true"]:
        main([*given, "--resume_from_checkpoint", how])
        told = capsys.readouterr().out
        assert "sft: this run is finished: nothing is left to train" in told
        assert f"policy: {tmp_path / 'x'}\n" in told
        assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(SystemExit) as ended:
        main([*given, "--resume_from_checkpoint", "auto", "--seed", "3"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert ("holds another run" if saving == "no" else "made with seed 42, this run has 3") in told


@pytest.mark.slow
def test_a_finished_run_on_other_data_is_another(saved_policy, sft_run):
    folder, options = sft_run
    given = {**options, "resume_from_checkpoint": True}
    finished = sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), folder, **given)
    assert finished.metrics["train_loss"] > 0
    with pytest.raises(InputError, match="made with training data"):
        sft(saved_policy, Dataset.from_list(DEMONSTRATIONS[::-1]), folder, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "way"),
    [("no", "begins again: there is no checkpoint yet"), ("steps", "goes on from {}/checkpoint-2")],
)
def test_ctrl_c_says_how_to_go_on(saved_policy, tmp_path, capsys, monkeypatch, saving, way):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    given = command(saved_policy, tmp_path, save_strategy=saving, save_steps=2, max_steps=4)
    with monkeypatch.context() as patched:
        patched.setattr(ProgressBar, "on_step_end", interrupt)
        with pytest.raises(SystemExit) as ended:
            main([*given, "--disable_tqdm=false"])
    assert ended.value.code == 130
    told = "sft: interrupted; the same command with --resume_from_checkpoint auto "
    assert told + way.format(tmp_path / "x") in capsys.readouterr().err.splitlines()
    main([*given, "--resume_from_checkpoint", "auto"])
    assert (tmp_path / "x" / "metrics.json").is_file()


def test_ctrl_c_before_the_first_step(tmp_path):
    assert way_on(tmp_path, begun=False) == "nothing was trained yet: the same command begins again"


# ---- NaN -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "pretrain"])
def test_weights_that_are_not_finite_are_never_saved(saved_policy, tmp_path, stage):
    """The last checkpoint before them stays."""
    options = {**QUICK, **SAVING, "learning_rate": 1e30, "max_steps": 4}
    runs = {
        "sft": lambda: sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), tmp_path, **options),
        "rm": lambda: rm(saved_policy, Dataset.from_list(RANKINGS), tmp_path, **options),
        "pretrain": lambda: pretrain(
            Dataset.from_dict({"text": ["some text"] * 9}),
            tmp_path,
            **{**options, "vocab_size": 300, "max_length": 8},
            architecture="gpt2",
            architecture_kwargs={"n_embd": 8, "n_layer": 1, "n_head": 1},
        ),
    }
    with pytest.raises(FloatingPointError, match=r"not finite after step \d, and are not saved; "):
        runs[stage]()
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    for path in all_checkpoints(tmp_path):
        weights = AutoModelForCausalLM.from_pretrained(path).parameters()
        assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.slow
def test_a_result_that_is_not_finite_is_one_line(saved_policy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DEMONSTRATIONS)))
    options = {**QUICK, "learning_rate": 1e30, "max_steps": 3, "output_dir": tmp_path / "x"}
    options |= {"model_name_or_path": saved_policy, "dataset_name": data}
    with pytest.raises(SystemExit) as ended:
        main(["sft", *(f"--{name}={value}" for name, value in options.items())])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("sft: error: Weights are not finite after step")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_ppo_ends_before_weights_are_not_finite(saved_policy, saved_reward_model, tmp_path):
    options = {**QUICK_PPO, "learning_rate": 1e30, "max_steps": 4}
    with pytest.raises(FloatingPointError):
        ppo(saved_policy, saved_reward_model, Dataset.from_list(PROMPTS), tmp_path, **options)
    assert not (tmp_path / "model.safetensors").exists()
