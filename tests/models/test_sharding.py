"""Processes that share out weights, gradients and optimizer state do what one process does."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from test_cli import ROOT, flags, write
from test_processes import SCRIPT, launch, results
from test_recipes import PROMPTS, QUICK_PPO
from transformers import GenerationConfig

from trl_instruct.errors import InputError
from trl_instruct.models import sharding
from trl_instruct.models.sharding import check_launch, check_saving

LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
KINDS = ["fsdp", pytest.param("zero2", marks=deepspeed), pytest.param("zero3", marks=deepspeed)]


def share(kind, *command):
    """Run a script in two CPU processes with that config of recipes/accelerate."""
    config = ROOT / "recipes" / "accelerate" / f"{kind}.yaml"
    cpu = {"ACCELERATE_USE_CPU": "true"} if kind == "fsdp" else {"DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [*LAUNCHER, str(config), str(SCRIPT.with_name("sharded_launch.py")), *map(str, command)],
        env={**os.environ, **cpu, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of it: its logs and weights."""
    folder = tmp_path_factory.mktemp("alone")
    launch(1, SCRIPT, folder, "no_average")
    logs = json.loads((folder / "logs.json").read_text(encoding="utf-8"))["logs"]
    return logs, results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does_and_can_be_resumed(kind, alone, tmp_path):
    share(kind, SCRIPT, tmp_path, "no_average")
    written = json.loads((tmp_path / "logs.json").read_text(encoding="utf-8"))
    assert written["processes"] == 2
    for one, two in zip(alone[0], written["logs"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    whole = results(tmp_path)
    torch.testing.assert_close(whole, alone[1])
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "model.safetensors").unlink()
    share(kind, SCRIPT, tmp_path, "no_average")  # goes on from checkpoint-1
    torch.testing.assert_close(results(tmp_path), whole, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_reference_is_still_the_policy_at_first(kind, tmp_path):
    share(kind, SCRIPT, tmp_path, "bf16")
    written = json.loads((tmp_path / "logs.json").read_text(encoding="utf-8"))
    assert [log["objective/kl"] == 0 for log in written["logs"]] == [True, False]
    if kind == "fsdp":  # gradients are summed in float32, and shards between micro-batches
        assert written["reduce_dtype"] == "torch.float32"
        assert all(written["reduced"]) and len(written["reduced"]) > 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_ppo_from_the_command_line(kind, tmp_path, saved_policy, saved_reward_model):
    """Completions end one after the other, so that each process has batches of its own number."""
    policy = shutil.copytree(saved_policy, tmp_path / "policy")
    GenerationConfig(eos_token_id=[256, *range(0, 250, 3)]).save_pretrained(policy)
    options = {
        **QUICK_PPO,
        "per_device_train_batch_size": 8,
        "response_length": 12,
        "model_name_or_path": policy,
        "reward_model_path": saved_reward_model,
        "dataset_name": write(tmp_path / "prompts.jsonl", PROMPTS),
        "output_dir": tmp_path / "ppo",
        "use_peft": True,
    }
    ran = share(kind, ROOT / "recipes" / "ppo.py", *flags(options))
    assert ran.stdout.count("policy: ") == 1
    metrics = json.loads((tmp_path / "ppo" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["episode"] == 16
    assert (tmp_path / "ppo" / "adapter_model.safetensors").is_file()


# ---- what is refused -----------------------------------------------------------------------------


def launched(kind, **settings):
    """An accelerator as those settings of a launcher would make it."""
    plugin = SimpleNamespace(
        **{"cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"} | settings
    )
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=plugin)
    return SimpleNamespace(
        distributed_type=kind, is_fsdp2=settings.get("fsdp_version", 2) == 2, state=state
    )


FSDP, DEEPSPEED = DistributedType.FSDP, DistributedType.DEEPSPEED
PLAIN = SimpleNamespace(
    **{"ema_decay": None, "stop_when_exploited": False, "value_warmup_iterations": 2},
    weight_decay=0.0,
)
AVERAGED = SimpleNamespace(**{**vars(PLAIN), "ema_decay": 0.9})
DECAYING = SimpleNamespace(**{**vars(PLAIN), "weight_decay": 0.1})
ONE, OTHER = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("accelerator", "models", "config", "told"),
    [
        (launched(DistributedType.MEGATRON_LM), [ONE, OTHER], PLAIN, "not supported"),
        (launched(FSDP, fsdp_version=1), [ONE, OTHER], PLAIN, "fsdp_version 1; set it to 2"),
        (launched(FSDP, cpu_ram_efficient_loading=True), [ONE, OTHER], PLAIN, "set it to false"),
        (launched(FSDP), [ONE, OTHER], AVERAGED, "ema_decay or stop_when_exploited; leave"),
        (launched(DEEPSPEED), [ONE, ONE], PLAIN, "policy and value share; set share_base"),
        (launched(DEEPSPEED), [ONE, OTHER], DECAYING, "weight_decay, which would change the pol"),
    ],
)
def test_what_does_not_go_together_is_told_before_the_first_step(accelerator, models, config, told):
    with pytest.raises(InputError, match=told):
        check_launch(accelerator, models, config)


def test_quantised_and_partitioned_weights_are_refused():
    small = torch.nn.Linear(2, 2).requires_grad_(False)
    small.weight.data = small.weight.data.to(torch.int8)
    with pytest.raises(InputError, match="weights of 8 or 4 bit"):
        check_launch(launched(FSDP), [small, OTHER], PLAIN)
    part = torch.nn.Linear(2, 2)
    part.weight.ds_id = 0
    with pytest.raises(InputError, match="load them before PPOConfig is made"):
        check_launch(launched(DEEPSPEED), [part, OTHER], PLAIN)


def test_processes_that_hold_all_weights_may_do_all_that():
    check_launch(launched(DistributedType.MULTI_GPU), [ONE, ONE], AVERAGED)
    check_launch(launched(DistributedType.NO), [ONE, ONE], DECAYING)
    check_launch(launched(FSDP), [ONE, OTHER], DECAYING)
    check_saving(launched(DistributedType.MULTI_GPU))


def test_a_stage_that_would_leave_no_whole_model_is_refused():
    with pytest.raises(InputError, match="fsdp_state_dict_type: FULL_STATE_DICT"):
        check_saving(launched(FSDP, state_dict_type="SHARDED_STATE_DICT"))
    check_saving(launched(FSDP))
    zero = {"zero_stage": 3, "deepspeed_config": {"zero_optimization": {}}}
    with pytest.raises(InputError, match="zero3_save_16bit_model: true"):
        check_saving(launched(DEEPSPEED, **zero))
    check_saving(launched(DEEPSPEED, **{**zero, "zero_stage": 2}))


def test_a_shared_base_is_not_made_where_weights_are_shared_out(monkeypatch):
    assert not sharding.launched_sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding.launched_sharded()
