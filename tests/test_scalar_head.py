"""A classifier where transformers has none: it must behave as if transformers had written it."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT
from datasets import Dataset
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MambaConfig,
    RwkvConfig,
    TrainerCallback,
    ViTConfig,
)
from trl import ModelConfig, RewardTrainer

from trl_instruct.configs import RewardConfig
from trl_instruct.errors import InputError
from trl_instruct.models.load import load_policy, load_reward_model
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.pretrain import pretrain
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import ScalarHead, disable_rescaling, register_scalar_head, score_head

KINDS = ["rwkv", "mamba"]
PLAIN = ModelConfig()
TEXTS = [[5, 6, 7, 8, 9], [10], [11, 256, 12]]  # the EOS inside a text is a token like any other
RANKINGS = [
    {"prompt": f"Q{i}: ", "responses": ["bad", "good one", "fair"], "ranks": [3, 1, 2]}
    for i in range(4)
]
QUICK = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}


def padded(texts, side, filler):
    """input_ids and attention_mask of the texts, padded on that side."""
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), filler)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(width - len(text), width) if side == "left" else slice(len(text))
        ids[row, columns] = torch.tensor(text)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def scores(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def by_hand(model, text):
    """The head's product with the backbone's last state of one text, by itself."""
    with torch.no_grad():
        states = model.eval().base_model(input_ids=torch.tensor([text])).last_hidden_state
    return states[0, -1] @ model.score.weight[0]


def rwkv_folder(make_policy, tokenizer, folder):
    make_policy("rwkv").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- the score -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [0, 256, 257], ids=["text", "eos", "pad"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_is_that_of_the_text_alone(make_reward_model, kind, side, filler):
    model = make_reward_model(kind)
    expected = torch.stack([by_hand(model, text) for text in TEXTS]).unsqueeze(1)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores(model, **padded(TEXTS, side, filler)), expected)
    alone = [scores(model, input_ids=torch.tensor([text])) for text in TEXTS]
    torch.testing.assert_close(torch.cat(alone), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_head_reads_every_token_in_the_given_columns(make_reward_model, side):
    """What a hook on the head sees stands where the tokens stand."""
    model, seen = make_reward_model("rwkv"), []
    score_head(model).register_forward_hook(lambda module, inputs, output: seen.append(output))
    inputs = padded(TEXTS, side, 257)
    scores(model, **inputs)
    for text, row, mask in zip(TEXTS, seen[0], inputs["attention_mask"].bool(), strict=True):
        expected = [by_hand(model, text[: t + 1]) for t in range(len(text))]
        torch.testing.assert_close(row[mask].squeeze(-1), torch.stack(expected))


def test_gradients_do_not_depend_on_padding(make_reward_model):
    model = make_reward_model("rwkv").train()
    gradients = []
    for side in ("left", "right"):
        model.zero_grad()
        model(**padded(TEXTS, side, 256)).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_what_would_have_to_change_the_score_is_refused(make_reward_model):
    model, ids = make_reward_model("rwkv"), torch.tensor([[5, 6]])
    with pytest.raises(InputError, match="RwkvForSequenceClassification was given position_ids; "):
        model(input_ids=ids, position_ids=ids)
    with pytest.raises(InputError, match=r"attention_mask of shape \(1, 1, 2, 2\) for input_ids"):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 2, 2))
    model(input_ids=ids, labels=None, output_hidden_states=False, return_dict=True, use_cache=False)


# ---- registration, saving, loading ---------------------------------------------------------------


def test_only_language_models_without_a_classifier_get_one(make_reward_model):
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    assert issubclass(known[RwkvConfig], ScalarHead) and issubclass(known[MambaConfig], ScalarHead)
    assert known[RwkvConfig].__name__ == "RwkvForSequenceClassification"
    for config_class in (RwkvConfig, LlamaConfig, ViTConfig):
        before = known.get(config_class, None)
        register_scalar_head(config_class)
        assert known.get(config_class, None) is before  # ViT: still none
    assert not isinstance(make_reward_model("llama"), ScalarHead)


@pytest.mark.parametrize("kind", ["granite", "olmoe"])
def test_a_backbone_that_is_not_known_beforehand(kind, tmp_path):
    """A folder of any language model gets its head: here one with attention, one with experts."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=256,
        pad_token_id=257,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, PLAIN, fresh_head=True)
    assert isinstance(model, ScalarHead)
    assert type(model).__name__ == f"{kind.capitalize()}ForSequenceClassification"
    expected = torch.stack([by_hand(model, text) for text in TEXTS]).unsqueeze(1)
    for side in ("left", "right"):
        torch.testing.assert_close(scores(model, **padded(TEXTS, side, 257)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_scores_the_same(make_reward_model, kind, tmp_path):
    model = make_reward_model(kind)
    expected = scores(model, **padded(TEXTS, "right", 257))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["architectures"] == [f"{kind.capitalize()}ForSequenceClassification"]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(plain, ScalarHead)
    for loaded in (plain, load_reward_model(tmp_path, PLAIN)):
        assert torch.equal(scores(loaded, **padded(TEXTS, "right", 257)), expected)


@pytest.mark.slow
def test_without_the_package_there_is_the_backbone_and_a_clear_error(make_reward_model, tmp_path):
    """What docs/design.md says that plain transformers does."""
    model = make_reward_model("rwkv")
    model.save_pretrained(tmp_path)
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForSequenceClassification
states = AutoModel.from_pretrained(sys.argv[1])(torch.tensor([[5, 6, 7]])).last_hidden_state
print(states[0, -1].tolist())
try:
    AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error).splitlines()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    state, error = done.stdout.splitlines()[-2:]
    score = torch.tensor(json.loads(state)) @ model.score.weight[0]
    torch.testing.assert_close(score, by_hand(model, [5, 6, 7]))
    assert error.startswith("Unrecognized configuration class <class 'transformers.models.rwkv")
    assert error.endswith("for this kind of AutoModel: AutoModelForSequenceClassification.")


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_policy_in_memory_or_its_folder(make_policy, tokenizer, tmp_path, kind):
    policy = make_policy(kind)
    policy.save_pretrained(tmp_path)
    torch.manual_seed(0)
    for source in (policy, tmp_path):
        model = load_reward_model(source, PLAIN, fresh_head=True)
        assert score_head(model).in_features == 16
        torch.testing.assert_close(
            dict(model.base_model.state_dict()), dict(policy.base_model.state_dict())
        )
        assert model.base_model is not policy.base_model


def test_a_policy_is_no_reward_model_and_the_reverse(make_policy, make_reward_model, tmp_path):
    make_policy("rwkv").save_pretrained(tmp_path / "policy")
    make_reward_model("rwkv").save_pretrained(tmp_path / "rm")
    with pytest.raises(InputError, match="lacks weights .*score.weight"):
        load_reward_model(tmp_path / "policy", PLAIN)
    with pytest.raises(InputError, match="lacks weights .*head.weight"):
        load_policy(tmp_path / "rm", PLAIN)


# ---- RWKV's rescaling ----------------------------------------------------------------------------


def test_a_policy_saved_after_use_is_the_policy_that_was_used(make_policy, tmp_path):
    """RWKV in eval mode halves weights in place; saved like that, they are halved twice."""
    policy, ids = make_policy("rwkv"), torch.tensor([[5, 6, 7]])
    expected = policy.train()(ids).logits
    policy.eval()(ids)
    policy.save_pretrained(tmp_path / "as it comes")
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "as it comes").train()
    assert (wrong(ids).logits - expected).abs().max() > 0.01  # else disable_rescaling can go
    load_policy(policy, PLAIN).save_pretrained(tmp_path / "ours")
    assert not any(module.training for module in policy.modules())
    torch.testing.assert_close(policy(ids).logits, expected)
    again = load_policy(tmp_path / "ours", PLAIN)
    torch.testing.assert_close(again.eval()(ids).logits, expected)
    torch.testing.assert_close(again.train()(ids).logits, expected)


def test_a_reward_model_from_a_policy_after_use(make_policy):
    policy = make_policy("rwkv")
    weights = copy.deepcopy(policy.base_model.state_dict())
    policy.eval()(torch.tensor([[5, 6, 7]]))
    model = load_reward_model(policy, PLAIN, fresh_head=True)
    torch.testing.assert_close(dict(model.base_model.state_dict()), dict(weights))
    assert model.base_model.config.rescale_every == model.config.rescale_every == 0


def test_other_models_are_left_alone(policy):
    before = policy.config.to_dict()
    disable_rescaling(policy)
    assert policy.config.to_dict() == before


# ---- training and use ----------------------------------------------------------------------------


def trainer_for(model, tokenizer, folder, trainer=RankingRewardTrainer, rows=RANKINGS, **options):
    config = RewardConfig(output_dir=str(folder), max_length=64, **{**QUICK, **options})
    return trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.slow
def test_it_learns_the_order(make_reward_model, eos_padded_tokenizer, tmp_path):
    """With TRL's default of gradient checkpointing, and pad == eos."""
    model = make_reward_model("rwkv")
    options = {"max_steps": 15, "logging_steps": 1}
    trainer = trainer_for(model, eos_padded_tokenizer, tmp_path, **options)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    history = [log for log in trainer.state.log_history if "accuracy" in log]
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["loss"] < 0.1 < 0.5 < history[0]["loss"]


@pytest.mark.slow
def test_trls_own_reward_trainer_takes_its_folder(make_policy, tokenizer, tmp_path):
    rows = [{"prompt": "Q: ", "chosen": "good", "rejected": "bad"}] * 4
    folder = str(rwkv_folder(make_policy, tokenizer, tmp_path / "policy"))
    trainer = trainer_for(folder, tokenizer, tmp_path / "rm", RewardTrainer, rows)
    assert isinstance(trainer.model, ScalarHead)
    assert trainer.train().training_loss > 0


def test_checkpointing_that_the_backbone_cannot_do_is_left_off(make_reward_model, monkeypatch):
    model = make_reward_model("rwkv")
    said = []
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    monkeypatch.setattr("trl_instruct.scalar_head.logger.warning_once", said.append)
    model.gradient_checkpointing_enable()
    assert "RwkvForSequenceClassification does not support gradient checkpointing" in said[0]


def test_as_a_reward_it_scores_each_text_as_if_alone(make_reward_model, eos_padded_tokenizer):
    model = make_reward_model("rwkv")
    reward = RewardModel(model, eos_padded_tokenizer, batch_size=2)
    prompts, completions = ["one ", "a longer prompt ", "two "], ["yes", "no, never", ""]
    texts = [f"{p}{c}<eos>" for p, c in zip(prompts, completions, strict=True)]
    expected = [by_hand(model, ids).item() for ids in eos_padded_tokenizer(texts)["input_ids"]]
    torch.testing.assert_close(reward(prompts, completions), expected)
    assert reward(["x" * 500], ["yes"]) == reward(["x" * (CONTEXT - 4)], ["yes"])


def test_ppo_learns_from_what_it_sampled(make_trainer):
    """In the first step the policy is the one that sampled: every ratio is 1."""
    trainer = make_trainer("rwkv", num_ppo_epochs=1, num_mini_batches=1)
    assert len({len(prompt) for prompt in trainer.prompts[:8]}) > 1
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "val/ratio" in log]
    assert log["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert log["policy/approxkl"] == pytest.approx(0.0, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_three_calls(make_policy, tokenizer, tmp_path, lora):
    """sft -> rm -> ppo from an RWKV language model; what is loaded is what was trained."""
    base, trained = rwkv_folder(make_policy, tokenizer, tmp_path / "base"), {}

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            trained[Path(args.output_dir).name] = getattr(model, "policy", model)

    options = {**QUICK, "callbacks": [Keep()], **({"use_peft": True, "lora_r": 4} if lora else {})}
    rows, inputs = Dataset.from_list, padded(TEXTS, "right", 257)
    demonstrations = [{"prompt": f"Q{i}: ", "completion": f"answer {i}"} for i in range(4)]
    policy = sft(base, rows(demonstrations), tmp_path / "sft", **options)
    reward = rm(policy, rows(RANKINGS), tmp_path / "rm", eval_size=0.25, **options)
    prompts = [{"prompt": "Q" * n + ": "} for n in (1, 5, 2, 9)]
    options = {**options, "num_mini_batches": 1, "response_length": 4}
    aligned = ppo(policy, reward, rows(prompts), tmp_path / "ppo", **options)
    loaded = {
        "sft": load_policy(policy, PLAIN),
        "rm": load_reward_model(reward, PLAIN),
        "ppo": load_policy(aligned, PLAIN),
    }
    assert isinstance(loaded["rm"], ScalarHead)
    for name, model in loaded.items():
        torch.testing.assert_close(scores(model, **inputs), scores(trained[name], **inputs))


@pytest.mark.slow
def test_all_four_stages_with_ratings_in_words(tmp_path):
    """From nothing: pre-training, SFT, a reward model from four rated responses a prompt, PPO."""
    rows, names = Dataset.from_list, ["good", "ok", "fair", "poor"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}
    made = {"architecture": "rwkv", "architecture_kwargs": sizes, "vocab_size": 280}
    texts = rows([{"text": f"question {i}: the answer"} for i in range(4)])
    base = pretrain(texts, tmp_path / "base", max_length=16, **made, **QUICK)
    prompts = [{"prompt": f"Q{i}: "} for i in range(4)]
    demonstrations = rows([{**row, "completion": "yes"} for row in prompts])
    policy = sft(base, demonstrations, tmp_path / "sft", **QUICK)
    rated = {"responses": ["a", "b", "c", "d"], "ratings": ["fair", "good", "poor", "ok"]}
    rankings = rows([{**row, **rated} for row in prompts])
    reward = rm(policy, rankings, tmp_path / "rm", rating_order=names, eval_size=0.25, **QUICK)
    assert (reward.metrics["pairs"], reward.metrics["eval_pairs"]) == (3 * 6, 6)
    options = {**QUICK, "num_mini_batches": 1, "response_length": 4}
    aligned = ppo(policy, reward, rows(prompts), tmp_path / "ppo", **options)
    assert load_policy(aligned, PLAIN).config.model_type == "rwkv"
    assert math.isfinite(aligned.metrics["objective/scores"])
