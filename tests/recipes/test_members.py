"""Several reward models of one call, and the average of weights."""

import json

import pytest
import torch
from datasets import Dataset
from test_recipes import LORA, PROMPTS, QUICK, QUICK_PPO, RANKINGS
from transformers import AutoModelForSequenceClassification

from trl_instruct import cli
from trl_instruct.errors import InputError
from trl_instruct.recipes.members import average
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.rewards.load import load_reward
from trl_instruct.scalar_head import keep_shift

SHOWN = Dataset.from_list([{"prompt": "Q1: ", "completion": "fair"}])
GIVEN = {**QUICK, "eval_size": 0.25, "demonstrations": SHOWN}


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_members_differ(saved_policy, tmp_path, capsys):
    """Each is what `member` alone gives; heads and prompts differ, what is held out does not."""
    data = Dataset.from_list(RANKINGS)
    result = rm(str(saved_policy), data, tmp_path / "rm", members=2, **GIVEN)
    one, two = result.metrics["members"]
    assert (one, two) == (str(tmp_path / "rm" / "member-1"), str(tmp_path / "rm" / "member-2"))
    alone = rm(str(saved_policy), data, tmp_path / "alone", member=2, **GIVEN)
    first, second, again = map(weights, (one, two, alone))
    assert all(torch.equal(second[name], again[name]) for name in second)
    assert torch.cosine_similarity(first["score.weight"], second["score.weight"]).abs() < 0.9
    assert result.metrics == json.loads((tmp_path / "rm" / "members.json").read_text())
    pairs = sum(row["pairs"] for row in result.metrics["by_dissent"])
    assert pairs == alone.metrics["eval_pairs"] == 6
    assert 0 <= result.metrics["accuracy"]["mean"] <= 1
    assert "members against their mean" in capsys.readouterr().out
    aligned = ppo(
        str(saved_policy),
        result.metrics["members"],
        Dataset.from_list(PROMPTS),
        tmp_path / "ppo",
        combine="pessimistic",
        combine_beta=0.5,
        **QUICK_PPO,
    )
    assert aligned.metrics["objective/disagreement"] > 0


@pytest.mark.slow
def test_members_that_are_adapters(saved_policy, tmp_path):
    """PPO loads them over one base; their average is that of the merged models."""
    data = Dataset.from_list(RANKINGS)
    result = rm(str(saved_policy), data, tmp_path / "rm", members=2, **GIVEN, **LORA)
    members = result.metrics["members"]
    options = {**QUICK_PPO, **LORA, "combine": "min", "share_base": True}
    ppo(str(saved_policy), members, Dataset.from_list(PROMPTS), tmp_path / "ppo", **options)
    average(members, tmp_path / "warm")
    one, two = (load_reward(folder).model.state_dict() for folder in members)
    for name, weight in weights(tmp_path / "warm").items():
        torch.testing.assert_close(weight, (one[name] + two[name]) / 2)


def test_members_need_a_folder():
    with pytest.raises(InputError, match="rm needs output_dir"):
        rm("x", Dataset.from_list(RANKINGS), members=2, **GIVEN)


def test_members_need_a_model_that_each_can_start_from(policy, tmp_path):
    with pytest.raises(InputError, match="the first would train the one"):
        rm(policy, Dataset.from_list(RANKINGS), tmp_path / "rm", members=2, **GIVEN)
    with pytest.raises(InputError, match="members excludes member and push_to_hub"):
        rm("x", Dataset.from_list(RANKINGS), tmp_path / "rm", members=2, member=1, use_cpu=True)


def test_the_average_of_weights(make_reward_model, tokenizer, tmp_path, capsys):
    """With the mean of the shifts, and a folder that plain transformers loads."""
    names = [str(tmp_path / name) for name in "abc"]
    for number, name in enumerate(names):
        model = make_reward_model(seed=number)
        keep_shift(model, float(number), 0.5)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    cli.main(["average", *names, str(tmp_path / "warm")])
    assert capsys.readouterr().out == f"reward model: {tmp_path / 'warm'}\n"
    found, parts = weights(tmp_path / "warm"), [weights(name) for name in names]
    for name, weight in found.items():
        torch.testing.assert_close(weight, sum(part[name] for part in parts) / 3)
    assert load_reward(str(tmp_path / "warm")).shift == 1.0
    assert "average of the weights of a, b, c" in (tmp_path / "warm" / "README.md").read_text()
    with pytest.raises(InputError, match="is not empty"):
        average(names, tmp_path / "warm")
    with pytest.raises(InputError, match="two or more reward models"):
        average(names[:1], tmp_path / "one")
    wide = make_reward_model(vocab_size=300)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="another shape or tokenizer"):
        average([names[0], tmp_path / "wide"], tmp_path / "two")


def test_the_command_names_the_members_folders(saved_policy, tmp_path, capsys):
    """As `--reward_model_path` takes them: the folder around them is no model."""
    data = tmp_path / "rankings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in RANKINGS), encoding="utf-8")
    named = f"--model_name_or_path {saved_policy} --dataset_name {data} --output_dir {tmp_path}/rm"
    how = "--members 2 --max_steps 1 --use_cpu true --save_strategy no --report_to none"
    cli.main(["rm", *named.split(), *how.split()])
    told = f"reward model: {tmp_path}/rm/member-1 {tmp_path}/rm/member-2"
    assert told in capsys.readouterr().out.splitlines()
