"""Adapters merged into their base, by a stage and by the command."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from test_load_models import adapter, logits
from test_recipes import DEMONSTRATIONS, LORA, PAIRS, PROMPTS, QUICK, QUICK_PPO, vowels
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from trl_instruct import cli
from trl_instruct.errors import InputError
from trl_instruct.files import write_manifest
from trl_instruct.models.load import load_reward_model, merge
from trl_instruct.models.properties import check_finished
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.rewards.load import load_reward
from trl_instruct.scalar_head import SHIFT_FILE


@pytest.fixture
def policy_adapter(saved_policy, tokenizer, tmp_path):
    """Folder of an adapter over the saved policy."""
    adapter(AutoModelForCausalLM.from_pretrained(saved_policy), tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_command(policy_adapter, tmp_path, capsys):
    cli.main(["merge", str(policy_adapter), str(tmp_path / "merged")])
    assert capsys.readouterr().out == f"merged: {tmp_path / 'merged'}\n"
    left = {path.name for path in (tmp_path / "merged").iterdir()}
    assert left == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        logits(AutoPeftModelForCausalLM.from_pretrained(policy_adapter)),
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<eos>"


@pytest.mark.slow
def test_a_reward_model_keeps_head_and_shift(saved_policy, tokenizer, tmp_path):
    classifier = load_reward_model(saved_policy, ModelConfig(), fresh_head=True)
    adapter(classifier, tmp_path / "rm", "SEQ_CLS", modules_to_save=["score"])
    tokenizer.save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / SHIFT_FILE).write_text('{"reward_shift": 0.5, "reward_std": 2.0}')
    merge(tmp_path / "rm", tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    torch.testing.assert_close(logits(plain), logits(peft))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["reward_shift"] == 0.5
    given = (["Q1: ", "Q2: "], ["yes", "no"])
    expected = load_reward(tmp_path / "rm")(*given)
    assert load_reward(tmp_path / "merged")(*given) == pytest.approx(expected, abs=1e-5)


def test_the_dtype_of_the_merged_weights(policy_adapter, tmp_path):
    folder = merge(policy_adapter, tmp_path / "half", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype is 'float12'"):
        merge(policy_adapter, tmp_path / "other", dtype="float12")


def test_what_cannot_be_merged(policy_adapter, saved_policy, tmp_path, capsys):
    for source in (saved_policy, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is not an adapter's folder: there is no adapter_con"):
            merge(source, tmp_path / "x")
    with pytest.raises(InputError, match="is not empty. Choose a new"):
        merge(policy_adapter, policy_adapter)
    (policy_adapter / "config.yaml").touch()
    check_finished(policy_adapter)  # another tool's file
    write_manifest(policy_adapter, ["config.yaml"])
    with pytest.raises(InputError, match="has not finished"):
        merge(policy_adapter, tmp_path / "x")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", str(saved_policy), str(tmp_path / "x")])
    assert stopped.value.code == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_stage_leaves_the_merged_model(saved_policy, tmp_path, stage):
    call, rows, quick = {
        "sft": (sft, DEMONSTRATIONS, QUICK),
        "rm": (rm, PAIRS, {**QUICK, "eval_size": 0}),
        "ppo": (ppo, PROMPTS, QUICK_PPO),
    }[stage]
    given = [saved_policy, *([vowels] if stage == "ppo" else []), Dataset.from_list(rows)]
    options = {**quick, **LORA, "load_in_8bit": True, "max_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 1}
    result = call(*given, tmp_path / "merged", merge_adapter=True, **options)
    left = {path.name for path in result.path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.json"} <= left
    assert not {name for name in left if name.startswith("adapter")}
    checkpoint = result.path / "checkpoint-1"
    merge(checkpoint, tmp_path / "by_hand")
    kind = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    models = [kind.from_pretrained(folder) for folder in (result, tmp_path / "by_hand")]
    torch.testing.assert_close(*map(logits, models))


@pytest.mark.slow
def test_a_base_from_memory_goes_with_the_adapter(policy, tokenizer, tmp_path):
    data, given = Dataset.from_list(DEMONSTRATIONS), {"processing_class": tokenizer}
    result = sft(policy, data, tmp_path / "x", merge_adapter=True, **given, **QUICK, **LORA)
    assert (result.path / "model.safetensors").is_file()
    assert not (result.path / "base").exists()
