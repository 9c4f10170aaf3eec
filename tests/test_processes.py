"""Two processes do what one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import evaluated
from safetensors.torch import load_file
from test_cli import ROOT, flags, write
from test_recipes import PROMPTS, QUICK_PPO

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("processes.py")
RESULTS = ("model.safetensors", "checkpoint-2/value_model/model.safetensors")


def launch(count, *command):
    """Run a script in that many CPU processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    ran = subprocess.run(
        [sys.executable, *(launcher if count > 1 else []), *map(str, command)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def results(folder):
    return {name: load_file(folder / name) for name in RESULTS}


def test_two_processes_with_half_the_batch_each_do_what_one_does(tmp_path):
    """Rewards and advantages whitened, KL adapted, ptx, moving average, what an ensemble and gold
    tell: all over both."""
    ran = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        launch(count, SCRIPT, folder)
        written = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
        assert written["processes"] == count
        ran[count] = (written["logs"], results(folder))
    assert ran[2][0][0].keys() >= {"objective/disagreement", "objective/gold_se"}
    for one, two in zip(ran[1][0], ran[2][0], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(ran[2][1], ran[1][1])
    two = tmp_path / "2"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {
        p.name for p in (two / "checkpoint-2").iterdir()
    }
    shutil.rmtree(two / "checkpoint-2")
    (two / "model.safetensors").unlink()
    launch(2, SCRIPT, two)  # goes on from checkpoint-1
    torch.testing.assert_close(results(two), ran[2][1], rtol=0, atol=0)


def test_one_base_in_two_processes(tmp_path, saved_policy):
    """Each process holds the base once; they agree on adapters and head."""
    (tmp_path / "base").symlink_to(saved_policy)
    names = ("adapter_model.safetensors", "checkpoint-2/value_model/adapter_model.safetensors")
    ran = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        launch(count, SCRIPT, folder, "one_base")
        written = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
        assert written["processes"] == count
        ran[count] = (written["logs"], {name: load_file(folder / name) for name in names})
    for one, two in zip(ran[1][0], ran[2][0], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(ran[2][1], ran[1][1])


def test_an_episode_skipped_in_one_of_two_processes(tmp_path):
    """Both skip what one process would skip, and go on together."""
    ran = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        launch(count, SCRIPT, folder, "skip")
        written = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
        ran[count] = (written["logs"], results(folder))
    assert sum(log["objective/skipped"] for log in ran[1][0]) > 0
    for one, two in zip(ran[1][0], ran[2][0], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(ran[2][1], ran[1][1])


def test_a_fault_in_one_of_two_processes_stops_both(tmp_path):
    """Neither waits for the other."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ran = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(tmp_path), "stop"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode != 0
    assert ran.stderr.count("trl_instruct.rewards.function.RewardError: Iteration ") == 2


def test_two_processes_evaluate_a_reward_model_as_one_does(tmp_path):
    """Five rankings: the one that fills the last batch of the second process counts once."""
    _, one = evaluated(tmp_path)
    launch(2, SCRIPT, tmp_path, "rm")
    two = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert two == pytest.approx(one, abs=1e-5)


def test_two_processes_share_out_what_is_measured_and_sampled(tmp_path):
    """The same figures as one process; of evaluate's 5 x 2 + 10 completions, each judges a part."""
    found = {}
    for count in (1, 2):
        launch(count, SCRIPT.with_name("shared_work.py"), tmp_path)
        folder = tmp_path / str(count)
        found[count] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        read = [json.loads(path.read_text()) for path in sorted(folder.glob("read-*.json"))]
        assert read == {1: [20], 2: [3 * 2 + 5, 2 * 2 + 5]}[count]
        lines = (folder / "candidates" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line)["prompt"] for line in lines]
        assert asked == [row["prompt"] for row in json.loads((folder / "prompts.json").read_text())]
        counts = found[count].pop("candidates")["train"]
        assert counts["responses"] + counts["duplicates"] + counts["empty"] == 15
    assert_same(found[2], found[1], unlike={"path", "seconds", "train_loss", "train_accuracy"})


def assert_same(one, other, *, unlike):
    """That two trees of JSON are the same, except at these keys."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - unlike:
            assert_same(one[key], other[key], unlike=unlike)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs, unlike=unlike)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    else:
        assert one == other


def test_ppo_in_two_processes_from_the_command_line(tmp_path, saved_policy, saved_reward_model):
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {
        **QUICK_PPO,
        "per_device_train_batch_size": 2,
        "model_name_or_path": saved_policy,
        "reward_model_path": saved_reward_model,
        "dataset_name": prompts,
        "output_dir": tmp_path / "ppo",
    }
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config]
    ran = launch(1, *launcher, ROOT / "recipes" / "ppo.py", *flags(options))
    assert ran.stdout.count("policy: ") == 1
    metrics = json.loads((tmp_path / "ppo" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["episode"] == 4
    assert (tmp_path / "ppo" / "model.safetensors").is_file()
