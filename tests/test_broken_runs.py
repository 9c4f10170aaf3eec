"""Runs of the tiny world that are broken on purpose: the diagnosis names what is broken.

That it finds nothing in a healthy run is seen on the main job, at the end of `.ci/run`.
"""

import json
from pathlib import Path

import pytest
import yaml

import trl_instruct
from trl_instruct import sample_candidates, sft
from trl_instruct.diagnosis.page import diagnose
from trl_instruct.recipes.chain import read_chain
from trl_instruct.recipes.pretrain import tiny_base
from trl_instruct.rewards.load import load_reward
from trl_instruct.tiny import split

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs" / "tiny"
RANKINGS, HELD_OUT = 600, 250
MAIN_JOB = Path(__file__).parents[1] / "runs" / "tiny"


def options(stage, **changed):
    """The tiny default's own, quiet, but for what is changed."""
    named = {"model_name_or_path", "reward_model_path", "dataset_name", "output_dir"}
    named |= {"summary_file", "eval_dataset_name"}
    given = yaml.safe_load((CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8"))
    kept = {name: value for name, value in given.items() if name not in named}
    return {**kept, "disable_tqdm": True, **changed}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """SFT policy and some ranked candidates, from the tiny default's base model.

    That takes two minutes to make, so the main job's is used where it has run.
    """
    folder = tmp_path_factory.mktemp("world")
    made = (MAIN_JOB / "base" / "metrics.json").is_file()
    base = tiny_base(MAIN_JOB / "base" if made else folder / "base", seed=0)
    policy = sft(base, "tiny:demonstrations", folder / "sft", **options("sft"))
    rows = split("rankings")
    parts = {"train": range(RANKINGS), "test": range(RANKINGS, RANKINGS + HELD_OUT)}
    for name, chosen in parts.items():
        sample_candidates(
            policy,
            rows.select(chosen),
            folder / f"{name}.jsonl",
            num_candidates=4,
            response_length=24,
            gold=load_reward("tiny"),
            per_device_eval_batch_size=256,
            seed=0,
        )
    return folder


@pytest.fixture(scope="module")
def reward(world):
    return train_reward(world, "rm", lambda ranking: ranking)


def train_reward(world, name, change, rows=RANKINGS, **changed):
    """A reward model of the rankings as they are after `change`, training and held out."""
    for part in ("train", "test"):
        lines = (world / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        rankings = [json.dumps(change(json.loads(line))) for line in lines[:rows]]
        (world / f"{name}_{part}.jsonl").write_text("\n".join(rankings), encoding="utf-8")
    data = str(world / f"{name}_train.jsonl")
    held_out = str(world / f"{name}_test.jsonl")
    chosen = options("rm", demonstrations_name=None, **changed)
    return trl_instruct.rm(world / "sft", data, world / name, eval_dataset=held_out, **chosen)


def run_ppo(world, reward, name, policy="sft", **changed):
    few = {"per_device_train_batch_size": 16, "total_episodes": 12 * 64}
    chosen = options("ppo", **{**few, **changed})
    return trl_instruct.ppo(world / policy, reward, "tiny:prompts", world / name, **chosen)


def faults(folder, stage):
    """Names of the faults that the diagnosis finds in one stage."""
    found = diagnose({stage: read_chain(folder)[stage]})
    return {finding.name for finding in found if finding.level == "fault"}


@pytest.fixture(scope="module")
def flipped(world):
    return train_reward(
        world, "flipped", lambda r: {**r, "scores": [-score for score in r["scores"]]}
    )


def test_labels_flipped(flipped):
    assert "labels_reversed" in faults(flipped, "rm")


def test_labels_flipped_in_training_alone(world, flipped):
    half = trl_instruct.rm(
        world / "sft",
        str(world / "flipped_train.jsonl"),
        world / "half_flipped",
        eval_dataset=str(world / "test.jsonl"),
        **options("rm", demonstrations_name=None),
    )
    assert "rm_reversed" in faults(half, "rm")
    assert "rm_reversed" not in faults(flipped, "rm")


def test_reward_model_trained_on_length(world):
    def by_length(ranking):
        kept = {name: ranking[name] for name in ("prompt", "responses")}
        return {**kept, "scores": [len(response.split()) for response in kept["responses"]]}

    assert "rm_is_length" in faults(train_reward(world, "length", by_length), "rm")


def test_reward_model_overfitted(world):
    few = train_reward(world, "epochs", lambda ranking: ranking, rows=150, num_train_epochs=10)
    assert "rm_overfitted" in faults(few, "rm")


def test_without_kl_penalty(world, reward):
    free = run_ppo(world, reward, "beta0", kl_coef=0.0, total_episodes=40 * 64)
    assert faults(free, "ppo") & {"over_optimised", "kl_blow_up"}


def test_learning_rate_a_hundred_times_too_high(world, reward):
    assert "kl_blow_up" in faults(run_ppo(world, reward, "wild", learning_rate=0.1), "ppo")


def test_completions_that_never_end(world, reward):
    """Demonstrations that run on where they should end, and are cut before their EOS.

    Learned for eight epochs: after four a completion in six still ends, and PPO mends the rest."""
    endless = split("demonstrations").map(
        lambda row: {"completion": " ".join([row["completion"]] * 10)}
    )
    changed = {"max_length": 64, "num_train_epochs": 8, "learning_rate": 1e-3}
    sft(world / "sft", endless, world / "endless_sft", **options("sft", **changed))
    found = faults(run_ppo(world, reward, "endless", "endless_sft"), "ppo")
    assert "missing_eos" in found


def test_value_function_frozen(world, reward):
    frozen = run_ppo(world, reward, "frozen", value_model_path="policy", value_learning_rate=0.0)
    assert faults(frozen, "ppo") == {"value_useless"}


def test_the_same_runs_unbroken(world, reward):
    """Fewer rankings and episodes than the default's, which shows; but nothing broken above."""
    full = {"per_device_train_batch_size": 32, "total_episodes": 12 * 128}
    found = faults(reward, "rm") | faults(run_ppo(world, reward, "sound", **full), "ppo")
    assert found <= {"rm_undertrained", "too_few_episodes"}
