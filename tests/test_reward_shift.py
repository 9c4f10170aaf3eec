"""Demonstrations score 0 on average: measured once, kept with the model, applied in every role."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from test_recipes import DEMONSTRATIONS, LORA, PAIRS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, chat
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.load import load_reward_model
from trl_instruct.ppo_trainer.rollouts import ValueModel
from trl_instruct.recipes import ppo as ppo_recipe
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import forget_shift, keep_shift, shift_of

SHOWN = Dataset.from_list(DEMONSTRATIONS)
GIVEN = SHOWN["prompt"][:], SHOWN["completion"][:]


def mean(values):
    return sum(values) / len(values)


def plain_scores(model, tokenizer):
    """What the classifier itself says of the demonstrations."""
    texts = [prompt + completion + "<eos>" for prompt, completion in zip(*GIVEN, strict=True)]
    with torch.no_grad():
        rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        return [model.eval()(input_ids=row).logits.item() for row in rows]


def test_the_demonstrations_score_0_on_average(reward_model, tokenizer):
    plain = plain_scores(reward_model, tokenizer)
    reward = RewardModel(reward_model, tokenizer)
    shift, std = reward.measure_shift(*GIVEN)
    assert shift == pytest.approx(mean(plain), rel=1e-5)
    assert std == pytest.approx(math.sqrt(mean([(s - mean(plain)) ** 2 for s in plain])), rel=1e-4)
    assert reward(*GIVEN) == pytest.approx([score - shift for score in plain], abs=1e-5)
    assert reward.measure_shift(*GIVEN) == pytest.approx((shift, std))  # not of shifted scores


def test_the_shift_stays_with_the_saved_model(reward_model, tokenizer, tmp_path):
    reward = RewardModel(reward_model, tokenizer)
    shift, std = reward.measure_shift(*GIVEN)
    for folder in ("once", "twice"):
        reward.model.save_pretrained(tmp_path / folder)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert (model.config.reward_shift, model.config.reward_std) == (shift, std)
        reward = RewardModel(model, tokenizer)
        assert mean(reward(*GIVEN)) == pytest.approx(0.0, abs=1e-5)


def test_a_model_with_our_scalar_head_keeps_it_too(make_policy, tokenizer, tmp_path):
    model = load_reward_model(make_policy("rwkv"), ModelConfig(), fresh_head=True)
    shift, _ = RewardModel(model, tokenizer).measure_shift(*GIVEN)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(tmp_path)
    assert reward.shift == shift != 0
    assert mean(reward(*GIVEN)) == pytest.approx(0.0, abs=1e-5)


def test_a_model_without_a_shift_has_0(reward_model):
    assert shift_of(reward_model) == 0.0
    keep_shift(reward_model, 2.5, 1.0)
    assert shift_of(reward_model) == 2.5
    forget_shift(reward_model)
    assert shift_of(reward_model) == 0.0
    assert not hasattr(reward_model.config, "reward_std")


def test_values_predict_the_shifted_score(reward_model, tokenizer):
    ids = tokenizer("Q: yes<eos>", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    value = ValueModel(reward_model)
    before = value(ids, mask, mask.cumsum(1) - 1)
    keep_shift(reward_model, 1.5, 1.0)
    torch.testing.assert_close(value(ids, mask, mask.cumsum(1) - 1), before - 1.5)
    last = value(ids, mask, mask.cumsum(1) - 1)[0, -1].item()
    assert RewardModel(reward_model, tokenizer)(["Q: "], ["yes"]) == pytest.approx([last], abs=1e-5)


def test_a_fresh_head_has_no_shift(reward_model, tmp_path):
    keep_shift(reward_model, 1.5, 1.0)
    reward_model.save_pretrained(tmp_path)
    assert shift_of(load_reward_model(tmp_path, ModelConfig())) == 1.5
    assert shift_of(load_reward_model(tmp_path, ModelConfig(), fresh_head=True)) == 0.0


# ---- in the stages -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [RANKINGS, PAIRS], ids=["rankings", "pairs"])
def test_rm_measures_it(saved_policy, tmp_path, rows):
    data = Dataset.from_list(rows)
    folder = tmp_path / "rm"
    result = rm(saved_policy, data, folder, demonstrations=SHOWN, eval_size=0, **QUICK)
    config = json.loads((folder / "config.json").read_text())
    assert config["reward_shift"] == result.metrics["shift"] != 0
    assert config["reward_std"] == result.metrics["std"]
    assert mean(load_reward(result)(*GIVEN)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_rm_without_demonstrations_drops_what_its_start_had(reward_model, tokenizer, tmp_path):
    keep_shift(reward_model, 1.5, 1.0)
    reward_model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    data = Dataset.from_list(RANKINGS)
    result = rm(tmp_path / "start", data, tmp_path / "rm", eval_size=0, **QUICK)
    assert "shift" not in result.metrics
    assert shift_of(load_reward(result).model) == 0.0
    assert "reward_shift" not in AutoConfig.from_pretrained(result).to_dict()


@pytest.mark.slow
def test_an_adapter_keeps_it_beside_itself(saved_policy, tmp_path):
    data = Dataset.from_list(RANKINGS)
    options = {**QUICK, **LORA, "eval_size": 0, "demonstrations": SHOWN}
    first = rm(saved_policy, data, tmp_path / "first", **options)
    assert not (first.path / "config.json").exists()
    reward = load_reward(first)
    assert reward.shift == first.metrics["shift"] != 0
    assert mean(reward(*GIVEN)) == pytest.approx(0.0, abs=1e-5)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(first, num_labels=1)
    expected = mean(plain_scores(plain, reward.tokenizer))
    assert expected == pytest.approx(reward.shift, rel=1e-4)
    # The adapter's base is now a reward model with a shift; the new adapter's has the say.
    second = rm(first, data, tmp_path / "second", **options)
    assert load_reward(second).shift == second.metrics["shift"] != reward.shift
    third = rm(first, data, tmp_path / "third", **{**options, "demonstrations": None})
    assert load_reward(third).shift == 0.0


@pytest.mark.slow
def test_ppo_values_start_from_the_shifted_score(
    saved_policy, reward_model, tokenizer, tmp_path, monkeypatch
):
    keep_shift(reward_model, 3.0, 1.0)
    reward_model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    seen = []

    class Kept(ppo_recipe.PPOTrainer):
        def __init__(self, *args, value_model, **kwargs):
            seen.append(shift_of(value_model))
            super().__init__(*args, value_model=value_model, **kwargs)

    monkeypatch.setattr(ppo_recipe, "PPOTrainer", Kept)
    ppo(saved_policy, tmp_path / "rm", Dataset.from_list(PROMPTS), tmp_path / "ppo", **QUICK_PPO)
    assert seen == [3.0]


def test_the_demonstrations_have_the_form_of_the_preferences(saved_policy, tmp_path):
    shown = Dataset.from_list([chat(row) for row in DEMONSTRATIONS])
    with pytest.raises(InputError, match="demonstrations are messages and the preferences text"):
        rm(saved_policy, Dataset.from_list(RANKINGS), tmp_path / "x", demonstrations=shown, **QUICK)
    with pytest.raises(InputError, match="`completion` missing"):
        prompts = Dataset.from_list(PROMPTS)
        rm(saved_policy, Dataset.from_list(PAIRS), tmp_path / "x", demonstrations=prompts, **QUICK)
    assert not (tmp_path / "x").exists()
