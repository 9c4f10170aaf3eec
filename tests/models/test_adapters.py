"""LoRA adapters that go on, and those that cannot."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from test_load_models import adapter, logits, save
from test_recipes import DEMONSTRATIONS, PAIRS, QUICK
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import (
    Adapter,
    new_adapter_config,
    peft_config_of,
)
from trl_instruct.models.load import load_policy, load_reward_model, merged
from trl_instruct.models.shared_base import SharedBase
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.rewards.load import load_reward
from trl_instruct.scalar_head import score_head

LORA = ModelConfig(use_peft=True)


@pytest.fixture
def folders(saved_policy, tokenizer, tmp_path):
    """A base of the test's own, and an adapter over it, rank 4."""
    base = save(AutoModelForCausalLM.from_pretrained(saved_policy), tokenizer, tmp_path / "base")
    adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    return {"base": base, "sft": tmp_path / "sft"}


def lora_weights(model):
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_policy_goes_on_from_its_adapter(folders, bits):
    model = load_policy(folders["sft"], ModelConfig(use_peft=True, **bits))
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].base_model_name_or_path == str(folders["base"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_weights(model))
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    expected = PeftModel.from_pretrained(base, folders["sft"])
    torch.testing.assert_close(lora_weights(model), lora_weights(expected))
    if not bits:
        torch.testing.assert_close(logits(model), logits(expected))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_reward_model_goes_on_from_a_policys_adapter(folders, bits):
    """The same hidden states, a head of the paper's scale, and both train."""
    config = ModelConfig(use_peft=True, **bits)
    model = load_reward_model(folders["sft"], config, fresh_head=True)
    policy = load_policy(folders["sft"], config)
    ids = torch.tensor([[72, 105, 33]])
    states = [m.get_base_model().base_model(ids).last_hidden_state for m in (model, policy)]
    torch.testing.assert_close(*states)
    assert 0.1 < score_head(model).weight.std() < 0.5  # 1 / sqrt(17) = 0.24
    assert score_head(model).weight.requires_grad
    kept = model.peft_config["default"]
    assert (kept.task_type, kept.base_model_name_or_path) == ("SEQ_CLS", str(folders["base"]))


@pytest.mark.slow
def test_adapters_and_head_are_float32_over_a_bfloat16_base(folders):
    """peft leaves the head in bfloat16, where an update of 1e-4 to a weight of 0.25 is lost."""
    half = ModelConfig(use_peft=True, dtype="bfloat16")
    policy = load_policy(folders["sft"], half)
    classifier = load_reward_model(folders["sft"], half, fresh_head=True)
    shared = SharedBase(folders["sft"], half).fresh_classifier()
    for model in (policy, classifier, shared):
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert logits(model).isfinite().all()
    head = score_head(classifier).weight
    classifier.train()(input_ids=torch.tensor([[72, 105]])).logits.sum().backward()
    assert head.grad.dtype == torch.float32 and head.grad.any()


@pytest.mark.slow
def test_a_bfloat16_reward_model_trains_its_head(saved_policy, tmp_path):
    options = {**QUICK, "use_peft": True, "dtype": "bfloat16", "learning_rate": 1e-5, "seed": 1}
    data, heads = Dataset.from_list(PAIRS), []
    for steps in (1, 3):
        folder = tmp_path / str(steps)
        rm(saved_policy, data, folder, eval_size=0, **{**options, "max_steps": steps})
        heads.append(load_peft_weights(str(folder))["base_model.model.score.weight"])
    assert heads[0].dtype == torch.float32
    assert 0 < (heads[1] - heads[0]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_nothing_is_rounded_over_a_quantised_base(folders, tmp_path, bits):
    """TRL's trainers make adapters over such a base bfloat16."""
    options = {**QUICK, "use_peft": True, bits: True, "learning_rate": 0.0, "max_steps": 1}
    sft(folders["sft"], Dataset.from_list(DEMONSTRATIONS), tmp_path / "again", **options)
    before = load_peft_weights(str(folders["sft"]))
    torch.testing.assert_close(load_peft_weights(str(tmp_path / "again")), before, rtol=0, atol=0)
    rm(folders["sft"], Dataset.from_list(PAIRS), tmp_path / "rm", eval_size=0, **options)
    after = load_peft_weights(str(tmp_path / "rm"))
    assert after.keys() - before.keys() == {"base_model.model.score.weight"}
    torch.testing.assert_close({n: after[n] for n in before}, before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("pad", [None, 256])
def test_the_score_is_read_where_it_was_trained(make_policy, eos_padded_tokenizer, tmp_path, pad):
    """An adapter leaves its base's config as it is, also the base that calls EOS the padding."""
    base = save(make_policy(pad_token_id=pad), eos_padded_tokenizer, tmp_path / "base")
    shown = Dataset.from_list(DEMONSTRATIONS)
    options = {**QUICK, "use_peft": True, "eval_size": 0, "demonstrations": shown}
    result = rm(base, Dataset.from_list(PAIRS), tmp_path / "rm", **options)
    scores = load_reward(result)(shown["prompt"][:], shown["completion"][:])
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-5)
    model = AutoPeftModelForSequenceClassification.from_pretrained(result, num_labels=1)
    text = shown[0]["prompt"] + shown[0]["completion"] + "<eos>"
    plain = logits(model, eos_padded_tokenizer(text)["input_ids"]).item()
    assert plain - result.metrics["shift"] == pytest.approx(scores[0], abs=1e-5)


# ---- options -------------------------------------------------------------------------------------


def test_options_that_the_adapter_has_decided(folders):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    Adapter.read(folders["sft"]).check_options(LORA)
    Adapter.read(folders["sft"]).check_options(ModelConfig(lora_r=4, lora_target_modules=names))
    Adapter.read(folders["sft"]).check_options(ModelConfig(lora_target_modules="all-linear"))
    for options, told in (
        ({"lora_r": 8}, "lora_r is 8, but the adapter in .* has 4. Leave lora_r .*merge first"),
        ({"lora_alpha": 64}, "lora_alpha is 64, .* has 8"),
        ({"use_dora": True}, "use_dora is True, .* has False"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules is q_proj, .*has down_proj, ga"),
    ):
        with pytest.raises(InputError, match=told):
            load_policy(folders["sft"], ModelConfig(use_peft=True, **options))


def test_targets_that_match_nothing(policy):
    missing = ModelConfig(use_peft=True, lora_target_modules=["query", "value"])
    told = "lora_target_modules is query, value, and LlamaForCausalLM has no such module. It has d"
    with pytest.raises(InputError, match=told):
        new_adapter_config(policy, missing)
    assert new_adapter_config(policy, LORA).target_modules == "all-linear"
    one = ModelConfig(use_peft=True, lora_target_modules=["q_proj"])
    assert new_adapter_config(policy, one).target_modules == {"q_proj"}
    assert new_adapter_config(policy, ModelConfig()) is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", [sft, rm])
def test_targets_that_match_nothing_leave_nothing(saved_policy, tmp_path, stage):
    data = Dataset.from_list(DEMONSTRATIONS if stage is sft else PAIRS)
    options = {**QUICK, "use_peft": True, "lora_target_modules": ["query"]}
    with pytest.raises(InputError, match="has no such module"):
        stage(saved_policy, data, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_the_users_modules_to_save_stay():
    config = ModelConfig(use_peft=True, lora_modules_to_save=["embed_tokens"])
    assert set(peft_config_of(config, "SEQ_CLS").modules_to_save) == {"embed_tokens", "score"}


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not an adapter's config .*JSONDecodeError"),
        ("[1]", "is not an adapter's config"),
        ('{"peft_type": "NOTHING"}', "is not an adapter's config .*NOTHING"),
        ('{"peft_type": "LORA"}', "names no base model"),
        ('{"peft_type": "LORA", "base_model_name_or_path": 3}', "names no base model"),
        ('{"peft_type": "LORA", "base_model_name_or_path": "x"}', "has no weights: there is no"),
    ],
)
def test_a_broken_config(tmp_path, content, told):
    (tmp_path / "adapter_config.json").write_text(content)
    for config in (ModelConfig(), LORA):
        with pytest.raises(InputError, match=told):
            load_policy(tmp_path, config)


@pytest.mark.parametrize("weights", [b"", b"cut"])
def test_broken_weights(folders, weights):
    (Path(folders["sft"]) / "adapter_model.safetensors").write_bytes(weights)
    for config in (ModelConfig(), LORA):
        with pytest.raises(InputError, match="adapter in '.*sft' does not fit"):
            load_policy(folders["sft"], config)


@pytest.mark.slow
def test_an_adapter_of_another_base(folders, make_policy, tokenizer):
    """The folder that it names holds another model now."""
    told = f"adapter in '{re.escape(str(folders['sft']))}' does not fit the .* from '.*base'"
    for other in (make_policy(hidden_size=32), make_policy("gpt2")):
        for path in folders["base"].iterdir():
            path.unlink()
        save(other, tokenizer, folders["base"])
        for config in (ModelConfig(), LORA):
            with pytest.raises(InputError, match=told):
                load_policy(folders["sft"], config)
            with pytest.raises(InputError, match=told):
                load_reward_model(folders["sft"], config, fresh_head=True)


def test_an_adapter_with_layers_that_the_base_lacks(folders, make_policy, tokenizer):
    """peft would leave them out without a word."""
    for path in folders["base"].iterdir():
        path.unlink()
    save(make_policy(num_hidden_layers=1), tokenizer, folders["base"])
    for load in (load_policy, load_reward_model):
        options = {"fresh_head": True} if load is load_reward_model else {}
        with pytest.raises(InputError, match=r"does not fit .*: it has no .*layers\.1\."):
            load(folders["sft"], LORA, **options)


def test_a_base_that_is_gone(folders, tmp_path):
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="No model could be loaded from '.*base'"):
        load_policy(folders["sft"], LORA)


def test_an_adapter_of_the_other_kind_does_not_go_on(folders, tmp_path):
    classifier = load_reward_model(folders["base"], ModelConfig(), fresh_head=True)
    adapter(classifier, tmp_path / "rm", "SEQ_CLS", modules_to_save=["score"])
    with pytest.raises(InputError, match="an adapter for SEQ_CLS; one for CAUSAL_LM is needed"):
        load_policy(tmp_path / "rm", LORA)
    with pytest.raises(InputError, match="an adapter for CAUSAL_LM; one for SEQ_CLS is needed"):
        load_reward_model(folders["sft"], LORA)


# ---- merging -------------------------------------------------------------------------------------


def test_what_was_trained_over_4_bit_is_merged_in_full_precision(folders):
    """Merged into the 4-bit weights, the adapter would be rounded with them."""
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    expected = logits(PeftModel.from_pretrained(base, folders["sft"]))
    model = merged(Adapter.read(folders["sft"]), ModelConfig(load_in_4bit=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.slow
def test_adapters_of_other_methods_are_merged_too(folders, tmp_path):
    config = json.loads((folders["sft"] / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    model = AutoModelForCausalLM.from_pretrained(folders["base"])
    dora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, use_dora=True)
    model.add_adapter(dora)
    model.save_pretrained(tmp_path / "dora")
    assert Adapter.read(tmp_path / "dora").config.use_dora
    other = AutoModelForCausalLM.from_pretrained(folders["base"])
    torch.testing.assert_close(
        logits(load_policy(tmp_path / "dora", ModelConfig())),
        logits(Adapter.read(tmp_path / "dora").on(other)),
    )


@pytest.mark.parametrize(
    "how",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [258, 259]},
    ],
    ids=lambda how: list(how)[-1],
)
def test_an_adapter_over_more_tokens_than_its_base_has(folders, tmp_path, how):
    """It fits once the base in the folder has them too."""
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    base.resize_token_embeddings(260)
    over = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **how))
    over.save_pretrained(tmp_path / "over")
    told = "does not fit .*resize_token_embeddings, then save_pretrained"
    for options in (LORA, ModelConfig()):
        with pytest.raises(InputError, match=told):
            load_policy(tmp_path / "over", options)
    over.unload().save_pretrained(folders["base"])
    assert load_policy(tmp_path / "over", LORA).get_input_embeddings().weight.shape[0] == 260
