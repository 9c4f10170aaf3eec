import math
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import SchedulerType
from trl import ModelConfig
from trl.scripts.utils import DatasetConfig

from trl_instruct.cli import parse
from trl_instruct.configs import (
    CandidatesConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
)
from trl_instruct.data.records import load_prompts
from trl_instruct.errors import InputError
from trl_instruct.option_checks import has_bf16
from trl_instruct.ppo_trainer.trainer import PPOTrainer
from trl_instruct.recipes.options import (
    config_text,
    field_types,
    named_sources,
    resolve,
    stage_options,
)
from trl_instruct.recipes.ppo import ppo

CONFIGS = [PretrainConfig, SFTConfig, CandidatesConfig, RewardConfig, PPOConfig]
# What differs from the defaults of transformers, of TRL, of ours; back to another's default; null.
CHANGED = {
    "learning_rate": 5e-5,
    "logging_steps": 500,
    "gradient_checkpointing": False,
    "max_steps": 3,
    "save_strategy": "epoch",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    "weight_decay": 0.1,
    "seed": 7,
    "bf16": False,
    "dataset_name": "数据.jsonl",
    "report_to": ["tensorboard"],
}


def round_trip(tmp_path, config_class, **options):
    config, model_config = resolve(config_class, None, None, {"output_dir": "x", **options})
    (tmp_path / "config.yaml").write_text(config_text(config, model_config), encoding="utf-8")
    return (config, model_config), parse(config_class, ["--config", str(tmp_path / "config.yaml")])


def as_dict(config):
    """Every option but where the logs of this moment go."""
    return {k: v for k, v in config.to_dict().items() if k != "logging_dir"}


@pytest.mark.slow
@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("options", [{}, CHANGED], ids=["defaults", "changed"])
def test_a_saved_config_reads_back_equal(tmp_path, config_class, options):
    (config, model_config), (again, model_again) = round_trip(tmp_path, config_class, **options)
    assert as_dict(again) == as_dict(config)
    assert model_again == model_config


def test_null_and_special_tokens_and_lora_read_back(tmp_path):
    options = {
        "max_length": None,
        "eos_token": "<eos>",
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    (_, model_config), (again, model_again) = round_trip(tmp_path, SFTConfig, **options)
    assert again.max_length is None
    assert again.eos_token == "<eos>"
    assert model_again == model_config


def test_secrets_are_not_saved(tmp_path):
    round_trip(tmp_path, SFTConfig, hub_token="hf_secret", overwrite_output_dir=True)
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "secret" not in text
    assert "overwrite_output_dir" not in yaml.safe_load(text)


def test_the_papers_values_are_the_defaults():
    sft, rm, ppo = (c(output_dir="x") for c in (SFTConfig, RewardConfig, PPOConfig))
    assert (sft.learning_rate, sft.num_train_epochs) == (9.65e-6, 16)
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 32
    assert sft.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (rm.learning_rate, rm.num_train_epochs) == (9e-6, 1)
    assert (ppo.kl_coef, ppo.cliprange, ppo.gamma, ppo.num_ppo_epochs) == (0.02, 0.2, 1.0, 1)
    minibatch = ppo.per_device_train_batch_size * ppo.gradient_accumulation_steps
    assert (minibatch, minibatch * ppo.num_mini_batches) == (64, 512)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_no_option_may_be_nan_or_infinite(config_class):
    """Nor may a number inside one; all options that take a float are asked."""
    types = field_types(config_class)
    floats = [name for name, kind in types.items() if float in (kind, *get_args(kind))]
    assert len(floats) > 10
    for name in floats:
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(InputError, match=f"^{name} is {value}; a finite number is needed"):
                config_class(output_dir="x", **{name: value})
    with pytest.raises(InputError, match="lr_scheduler_kwargs is .*nan}; a finite number"):
        config_class(output_dir="x", lr_scheduler_kwargs={"min_lr_rate": math.nan})


def test_no_option_of_the_model_may_be_nan(tmp_path):
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=f"lora_dropout is {value}; a finite number"):
            stage_options(SFTConfig, None, None, tmp_path, "x", {"lora_dropout": value})


@pytest.mark.parametrize("real", [True, False])
def test_bfloat16_that_is_imitated_is_no_default(monkeypatch, real):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    imitated = {"including_emulation": False}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: real or given != imitated)
    assert has_bf16() is real


def test_a_scheduler_without_a_floor_gets_none():
    assert SFTConfig(output_dir="x", lr_scheduler_type="linear").lr_scheduler_kwargs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1e-5}, r"Unknown option 'learning_rat' for SFTConfig. Did you mean 'lea"),
        ({"lora_ranks": 8}, r"Unknown option 'lora_ranks' for SFTConfig\."),
        ({"lora_rank": 8}, r"lora_rank is not an option here: use lora_r \(docs/names.md\)\."),
        ({"learning_rate": "fast"}, r"learning_rate is str 'fast'; float is needed"),
        ({"max_length": 1.5}, r"max_length is float 1.5; int \| None is needed"),
        ({"packing": 1}, r"packing is int 1; bool is needed"),
        ({"seed": True}, r"seed is bool True; int is needed"),
        ({"dataset_name": ["a", "b"]}, r"dataset_name is list .* is needed"),
        ({"lora_r": "8"}, r"lora_r is str '8'; int is needed"),
        ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type: zigzag is not a valid SchedulerT"),
        ({"learning_rate": -1}, r"learning_rate is -1; it must not be negative"),
        ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers above 0"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "needs an eval_strategy and a save_strategy",
        ),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha is -1.0; it must not be negative"),
        ({"per_device_train_batch_size": 0}, r"train_batch_size is 0; it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, r"accumulation_steps is 0; it must be at least 1"),
        ({"num_train_epochs": -1.0}, r"num_train_epochs is -1.0; make it above 0"),
        ({"learning_rate": None}, r"learning_rate is null or absent; float is needed"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(SFTConfig, None, None, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mini_batches": 0}, "num_mini_batches is 0; it must be at least 1"),
        ({"response_length": 0}, "response_length is 0"),
        ({"total_episodes": 0}, "total_episodes is 0"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1; it must not be negative"),
        ({"adaptive_kl_target": 0.0}, "adaptive_kl_target is 0.0; it must be above 0"),
        ({"target_kl": -0.1}, "target_kl is -0.1; it must be above 0"),
        ({"value_learning_rate": -1.0}, "value_learning_rate is -1.0; it must not be negative"),
        ({"cliprange": -0.2}, "cliprange is -0.2; it must not be negative"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0; it must be above 1"),
        ({"gamma": 1.5}, "gamma is 1.5; it must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0; it must not be negative"),
        ({"kl_estimator": "k2"}, "kl_estimator is str 'k2'"),
        (
            {"kl_estimator": "k3"},
            "k3'; as a reward, its gradient is that of KL.policy || ref. - KL",
        ),
    ],
)
def test_bad_ppo_options(options, message):
    with pytest.raises(InputError, match=message):
        resolve(PPOConfig, None, None, {"output_dir": "x", **options})


def test_paths_enums_and_whole_numbers_are_taken():
    options = {
        "output_dir": Path("runs") / "x",
        "learning_rate": 1,
        "lr_scheduler_type": SchedulerType.LINEAR,
        "resume_from_checkpoint": True,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    config, model_config = resolve(SFTConfig, None, None, options)
    assert (config.output_dir, config.learning_rate) == ("runs/x", 1)
    assert config.resume_from_checkpoint is True
    assert model_config.lora_target_modules == ["q_proj", "v_proj"]


def test_a_ready_config_is_copied_and_takes_no_options_beside_it():
    config, model_config = SFTConfig(output_dir="x"), ModelConfig(lora_r=3)
    taken, model_taken = resolve(SFTConfig, config, model_config, {})
    assert taken is not config and as_dict(taken) == as_dict(config)
    assert model_taken is not model_config and model_taken == model_config
    with pytest.raises(InputError, match=r"config= and options \['seed'\] were given"):
        resolve(SFTConfig, config, None, {"seed": 1})
    with pytest.raises(InputError, match=r"model_config= and options \['lora_r'\]"):
        resolve(SFTConfig, None, model_config, {"output_dir": "x", "lora_r": 1})


def test_one_text_is_a_list_of_one(tmp_path):
    """Not a list of its letters: each completion ended at the first E, N or D."""
    assert PPOConfig(str(tmp_path), stop_strings="END").stop_strings == ["END"]
    assert RewardConfig(str(tmp_path), columns="prompt=q").columns == ["prompt=q"]
    file = tmp_path / "a.yaml"
    file.write_text(f"stop_strings: END\noutput_dir: {tmp_path}\n", encoding="utf-8")
    assert parse(PPOConfig, ["--config", str(file)])[0].stop_strings == ["END"]


@pytest.mark.parametrize(
    ("given", "taken"), [("True", True), ("false", False), ("x/checkpoint-2", "x/checkpoint-2")]
)
def test_resume_from_checkpoint_as_a_flag_gives_it(given, taken):
    config, _ = parse(SFTConfig, ["--output_dir", "x", "--resume_from_checkpoint", given])
    assert config.resume_from_checkpoint == taken


def test_whole_numbers_are_numbers():
    """YAML reads `adam_beta2: 0` as an int, which torch refuses beside a float."""
    assert isinstance(SFTConfig(adam_beta2=0, use_cpu=True, bf16=False).adam_beta2, float)


@pytest.mark.parametrize("name", ["top_p", "top_k", "repetition_penalty"])
def test_sampling_settings_that_would_break_the_importance_ratio(name):
    with pytest.raises(
        InputError, match=f"{name} is not an option here: PPO weighs each sampled token"
    ):
        resolve(PPOConfig, None, None, {"output_dir": "x", name: 0.9})
    with pytest.raises(InputError, match="Unknown option"):
        resolve(SFTConfig, None, None, {"output_dir": "x", name: 0.9})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("reward_model", "use reward_model_path, in Python the argument reward"),
        ("eval_dataset", "use eval_dataset_name or dataset_test_split"),
        ("peft_config", "use use_peft, lora_r, lora_alpha"),
        ("ref_model", "the reference is the policy that ppo starts from"),
    ],
)
def test_arguments_of_other_libraries_are_answered(name, told):
    """In one line that names the page, by the stage and by its trainer; None is no mistake."""
    for call in (partial(ppo, "gpt2", output_dir="x"), partial(PPOTrainer, *[None] * 7)):
        if call.func is PPOTrainer and name in ("reward_model", "ref_model"):
            continue  # its own
        with pytest.raises(InputError, match=rf"{name} is not an .* here: {told}") as caught:
            call(**{name: "x"})
        assert "docs/names.md" in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_as_trls_ppo_trainer_takes_them():
    tokens = Dataset.from_dict({"input_ids": [[1, 2]]})
    told = r"input_ids are tokens; give the text in `prompt` \(docs/names.md\)"
    with pytest.raises(InputError, match=told):
        load_prompts(tokens)
    with pytest.raises(InputError, match=told):
        PPOTrainer(*[None] * 5, tokens, None, eval_dataset=None)


def test_options_of_trls_ppo_config_that_have_another_name_here():
    with pytest.raises(
        InputError, match=r"sft_model_path is not an option here: .*model_name_or_path"
    ):
        resolve(PPOConfig, None, None, {"output_dir": "x", "sft_model_path": "gpt2"})


def test_a_mixture_of_objects_is_saved_as_yaml(tmp_path):
    mixture = [DatasetConfig("a.jsonl", fraction=1.0)]
    given = stage_options(SFTConfig, None, None, tmp_path, mixture, {"use_cpu": True})
    (tmp_path / "config.yaml").write_text(config_text(*given), encoding="utf-8")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["datasets"]
    assert [DatasetConfig(**entry) for entry in saved] == mixture


@pytest.mark.parametrize("config_class", [c for c in CONFIGS if c is not SFTConfig])
def test_stages_that_do_not_stream_say_so(config_class):
    options = {"use_cpu": True, "dataset_streaming": True}
    with pytest.raises(InputError, match="dataset_streaming: sft alone reads while it trains"):
        stage_options(config_class, None, None, "x", "d.jsonl", options, trains=False)


def test_sources_are_named_by_their_last_part():
    named = named_sources(["base=gpt2", "runs/mine/sft/", "rewards.py:brevity"], "models")
    assert named == {"base": "gpt2", "sft": "runs/mine/sft/", "brevity": "rewards.py:brevity"}
