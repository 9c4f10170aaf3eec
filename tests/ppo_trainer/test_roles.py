"""Chains of stages over one base, and which roles share it."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from conftest import tiny_model
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from test_load_models import logits, save
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, vowels
from transformers import AutoTokenizer
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import Adapter, is_quantized
from trl_instruct.models.load import merge
from trl_instruct.ppo_trainer.roles import load_roles
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.rewards.function import parts_of
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import score_head, shift_of

pytestmark = pytest.mark.slow  # whole stages

LORA = {"use_peft": True, "lora_r": 4}
ON = {"use_peft": True}  # goes on from an adapter, or makes one
QUICK = {**QUICK, "max_steps": 1}
SHARED = {**QUICK_PPO, "share_base": True}


def run_sft(model, folder, **options):
    return sft(model, Dataset.from_list(DEMONSTRATIONS), folder, **{**QUICK, **options})


def run_rm(model, folder, **options):
    shown = Dataset.from_list(DEMONSTRATIONS)
    given = {"eval_size": 0, "demonstrations": shown, **QUICK, **options}
    return rm(model, Dataset.from_list(RANKINGS), folder, **given)


def run_ppo(model, reward, folder, **options):
    return ppo(model, reward, Dataset.from_list(PROMPTS), folder, **{**SHARED, **options})


def base_of(result):
    return Adapter.read(result).base


@pytest.fixture(scope="module")
def chain(tmp_path_factory, saved_policy):
    """LoRA in all stages."""
    folder = tmp_path_factory.mktemp("chain")
    policy = run_sft(saved_policy, folder / "sft", **LORA)
    reward = run_rm(policy, folder / "rm", **ON)
    return {"sft": policy, "rm": reward, "ppo": run_ppo(policy, reward, folder / "ppo", **ON)}


def roles_of(ppo_config, tokenizer, model, reward, value=None, **options):
    """The roles as `ppo` would load them."""
    config = ppo_config(share_base=options.pop("share_base", None))
    return load_roles(model, reward, value, tokenizer, config, ModelConfig(**{**ON, **options}))


# ---- chains --------------------------------------------------------------------------------------


def test_a_chain_stays_over_the_first_base(chain, saved_policy):
    for name, result in chain.items():
        assert base_of(result) == str(saved_policy)
        left = {path.name for path in result.path.iterdir()}
        assert not {"base", "model.safetensors"} & left
        assert Adapter.read(result).config.r == 4
        size = sum(path.stat().st_size for path in result.path.glob("*.safetensors"))
        assert size < 40_000, name
    AutoPeftModelForCausalLM.from_pretrained(chain["ppo"])
    AutoPeftModelForSequenceClassification.from_pretrained(chain["rm"], num_labels=1)


@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_quantised_chain(saved_policy, tmp_path, capsys, bits):
    options = {**ON, **bits, "optim": "adamw_bnb_8bit", "gradient_checkpointing": True}
    policy = run_sft(saved_policy, tmp_path / "sft", lora_r=4, **options)
    reward = run_rm(policy, tmp_path / "rm", **options)
    aligned = run_ppo(policy, reward, tmp_path / "ppo", **options)
    assert {base_of(r) for r in (policy, reward, aligned)} == {str(saved_policy)}
    config = yaml.safe_load((aligned.path / "config.yaml").read_text())
    assert config["optim"] == "adamw_bnb_8bit" and config["share_base"] is True
    told = capsys.readouterr().out.splitlines()
    (base,) = [line for line in told[told.index("ppo: memory") :] if line.startswith("shared ")]
    assert ("int8" if "load_in_8bit" in bits else "nf4") in base
    AutoPeftModelForCausalLM.from_pretrained(aligned)


def test_a_full_policy_is_the_base_of_what_follows(saved_policy, tmp_path):
    policy = run_sft(saved_policy, tmp_path / "sft")
    reward = run_rm(policy, tmp_path / "rm", **LORA)
    aligned = run_ppo(policy, reward, tmp_path / "ppo", **LORA)
    assert {base_of(reward), base_of(aligned)} == {str(policy)}


def test_a_merged_model_anywhere(chain, tmp_path):
    merged = {name: merge(chain[name], tmp_path / name) for name in chain}
    reward = run_rm(merged["sft"], tmp_path / "rm2", **LORA)
    aligned = run_ppo(merged["sft"], reward, tmp_path / "ppo2", **LORA)
    assert {base_of(reward), base_of(aligned)} == {str(merged["sft"])}
    run_ppo(chain["sft"], merged["rm"], tmp_path / "lora", share_base=None, **ON)
    run_ppo(merged["ppo"], chain["rm"], tmp_path / "full", share_base=None)


def test_paged_optimizers(chain, saved_policy, tmp_path):
    """On CPU bitsandbytes says that it does not page, and goes on."""
    options = {**ON, "optim": "paged_adamw_8bit"}
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU. Falling back"):
        run_sft(saved_policy, tmp_path / "sft", **options)
        run_rm(chain["sft"], tmp_path / "rm", **options)
    run_ppo(chain["sft"], chain["rm"], tmp_path / "ppo", **{**options, "optim": "paged_lion_8bit"})


# ---- roles ---------------------------------------------------------------------------------------


def test_what_each_role_starts_from(chain, ppo_config, tokenizer):
    roles = roles_of(ppo_config, tokenizer, chain["sft"], chain["rm"])
    policy = AutoPeftModelForCausalLM.from_pretrained(chain["sft"])
    for model in (roles.policy, roles.ref_policy):
        torch.testing.assert_close(logits(model), logits(policy))
    reward = AutoPeftModelForSequenceClassification.from_pretrained(chain["rm"], num_labels=1)
    for model in (roles.reward.model, roles.value):
        torch.testing.assert_close(logits(model), logits(reward))
        assert shift_of(model) == chain["rm"].metrics["shift"]
    trains = [any(p.requires_grad for p in m.parameters()) for m in (*roles[:2], roles.value)]
    assert trains == [True, False, True]
    assert not any(p.requires_grad for p in roles.reward.model.parameters())


@pytest.mark.parametrize("start", ["sft", "base"])
def test_the_value_function_starts_from_the_policy(
    chain, saved_policy, ppo_config, tokenizer, start
):
    source = chain["sft"] if start == "sft" else saved_policy
    for reward, value in ((vowels, None), (chain["rm"], "policy")):
        roles = roles_of(ppo_config, tokenizer, source, reward, value, share_base=True)
        assert not score_head(roles.value).weight.any()
        ids = torch.tensor([[72, 105, 33]])
        models = [model.eval().get_base_model() for model in (roles.policy, roles.value)]
        states = [model.base_model(ids)[0] for model in models]
        torch.testing.assert_close(*states)
        assert (roles.ref_policy is None) == (start == "base")


def test_several_rewards_over_one_base(chain, ppo_config, tokenizer):
    config = ppo_config(share_base=True, reward_weights=[1.0, 0.5, 2.0])
    rewards = [chain["rm"], vowels, str(chain["rm"])]
    roles = load_roles(chain["sft"], rewards, None, tokenizer, config, ModelConfig(**ON))
    given = (["Q1: "], ["yes"])
    alone = roles_of(ppo_config, tokenizer, chain["sft"], chain["rm"]).reward(*given)[0]
    assert roles.reward(*given) == pytest.approx([3 * alone + 0.5], abs=1e-5)  # one vowel


def test_a_list_of_one_reward_model_is_that_model(chain, ppo_config, tokenizer):
    roles = roles_of(ppo_config, tokenizer, chain["sft"], [chain["rm"]], share_base=True)
    alone = roles_of(ppo_config, tokenizer, chain["sft"], chain["rm"], share_base=True)
    torch.testing.assert_close(score_head(roles.value).weight, score_head(alone.value).weight)
    embeddings = [model.get_input_embeddings() for model in (roles.policy, roles.value)]
    assert embeddings[0] is embeddings[1]  # the value model is over the shared base too


def test_models_can_stay_apart(chain, ppo_config, tokenizer):
    together = roles_of(ppo_config, tokenizer, chain["sft"], chain["rm"])
    apart = roles_of(ppo_config, tokenizer, chain["sft"], chain["rm"], share_base=False)
    for one, two in zip(together, apart, strict=True):
        models = (one.model, two.model) if isinstance(one, RewardModel) else (one, two)
        torch.testing.assert_close(*map(logits, models))
    embeddings = [m.get_input_embeddings().weight for m in (apart.policy, apart.value)]
    assert embeddings[0] is not embeddings[1]
    assert embeddings[1].requires_grad and not isinstance(apart.value, PeftModel)


def test_a_reward_model_over_another_base(chain, make_policy, tokenizer, tmp_path, ppo_config):
    other = save(make_policy(seed=8), tokenizer, tmp_path / "other")
    reward = run_rm(other, tmp_path / "rm", **LORA)
    roles = roles_of(ppo_config, tokenizer, chain["sft"], reward)
    expected = AutoPeftModelForSequenceClassification.from_pretrained(reward, num_labels=1)
    torch.testing.assert_close(logits(roles.reward.model), logits(expected))
    told = "the value model from '.*other' is not an adapter over the policy's base, '.*policy0'"
    with pytest.raises(InputError, match=told):
        run_ppo(chain["sft"], reward, tmp_path / "x", **ON)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_reward_model_judges_only(
    chain, saved_policy, saved_reward_model, tmp_path, bits
):
    for source in (saved_reward_model, chain["rm"]):
        given, exact = (["Q1: ", "Q2: "], ["yes", "no"]), load_reward(source)
        judge = load_reward(source, model_config=ModelConfig(**{bits: True}))
        scores = zip(judge(*given), exact(*given), strict=True)
        # Four bits on layers 16 wide: off by up to 1.2, of a scale on which scores differ by 2.4.
        assert all(0 < abs(one - two) < 1.5 for one, two in scores)
    run_ppo(saved_policy, judge, tmp_path / "x", share_base=None, value_model_path="policy")
    with pytest.raises(InputError, match="a value model that starts from them could not train"):
        run_ppo(saved_policy, judge, tmp_path / "y", share_base=None)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"load_in_8bit": True}])
def test_a_reward_model_of_its_own_is_loaded_as_the_policy_is(
    chain, saved_reward_model, ppo_config, tokenizer, options
):
    """As TRL's script does; the value model that starts from it trains in float32."""
    exact = load_reward(saved_reward_model)
    for reward in (saved_reward_model, [saved_reward_model, vowels]):
        roles = roles_of(ppo_config, tokenizer, chain["sft"], reward, **options)
        (judge,) = (part for part in parts_of(roles.reward) if isinstance(part, RewardModel))
        assert judge.model.dtype is torch.bfloat16 or is_quantized(judge.model)
        given = ["Q1: "], ["yes"]
        assert judge(*given) == pytest.approx(exact(*given), abs=0.5)
    start = roles_of(ppo_config, tokenizer, chain["sft"], saved_reward_model, **options).value
    assert all(w.dtype is torch.float32 and w.requires_grad for w in start.parameters())
    torch.testing.assert_close(logits(start), logits(exact.model))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_folder_of_quantised_weights(
    saved_policy, saved_reward_model, tokenizer, ppo_config, tmp_path, bits
):
    loaded = load_reward(saved_reward_model, model_config=ModelConfig(**{bits: True}))
    loaded.model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    given = (["Q1: ", "Q2: "], ["yes", "no"])
    again = load_reward(tmp_path / "rm")
    assert is_quantized(again.model)
    assert again(*given) == pytest.approx(loaded(*given), abs=1e-4)
    for reward in (tmp_path / "rm", again):
        with pytest.raises(InputError, match="a value model that starts from them could not train"):
            load_roles(saved_policy, reward, None, tokenizer, ppo_config(), ModelConfig())


def test_a_reward_model_in_a_python_file(saved_policy, saved_reward_model, ppo_config, tokenizer):
    """The value function starts from it."""
    file = saved_reward_model.parent / "judges.py"
    file.write_text(
        f"from trl_instruct import load_reward\nmodel = load_reward({str(saved_reward_model)!r})\n"
    )
    named = f"{file}:model"
    roles = load_roles(saved_policy, named, None, tokenizer, ppo_config(), ModelConfig())
    start = load_reward(saved_reward_model).model
    torch.testing.assert_close(logits(roles.value), logits(start))
    assert roles.value is not roles.reward.model
    assert all(weight.requires_grad for weight in roles.value.parameters())


def test_an_attention_of_the_policys_is_its_own(make_reward_model, tokenizer, tmp_path, ppo_config):
    """RWKV has no attention to choose."""
    reward = save(make_reward_model("rwkv"), tokenizer, tmp_path / "rwkv")
    policy = save(tiny_model(), tokenizer, tmp_path / "policy")
    config = ModelConfig(attn_implementation="eager")
    roles = load_roles(policy, reward, None, tokenizer, ppo_config(), config)
    assert roles.policy.config._attn_implementation == "eager"
    assert type(roles.reward.model).__name__.startswith("Rwkv")


def test_sharing_that_is_not_possible(chain, saved_policy, saved_reward_model, tmp_path):
    loaded = AutoPeftModelForCausalLM.from_pretrained(chain["sft"])
    for model, reward, options, told in (
        (saved_policy, chain["rm"], {}, "without use_peft the policy is not an adapter"),
        (loaded, chain["rm"], ON, "the policy is a loaded PeftModel; give its folder"),
        (chain["sft"], saved_reward_model, ON, "the value model from .* is not an adapter over"),
        (chain["sft"], [saved_reward_model, vowels], ON, "the reward model from .* not an adapter"),
    ):
        given = {"processing_class": AutoTokenizer.from_pretrained(saved_policy), **options}
        with pytest.raises(InputError, match=f"share_base is true, but {told}"):
            run_ppo(model, reward, tmp_path / "x", **given)
    assert not (tmp_path / "x").exists()


def test_a_loaded_adapter_is_its_own_reference(chain, ppo_config, tokenizer):
    loaded = AutoPeftModelForCausalLM.from_pretrained(chain["sft"], is_trainable=True)
    expected = logits(loaded)
    roles = roles_of(ppo_config, tokenizer, loaded, vowels)
    assert roles.policy is loaded
    torch.testing.assert_close(logits(roles.ref_policy), expected)
    assert not any(p.requires_grad for p in roles.ref_policy.parameters())


def test_another_models_tokenizer(saved_policy, tokenizer, tmp_path):
    """It has ids that the model has no embedding for."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["more", "words"])
    given = {"processing_class": other}
    told = "'words', has the id 259, but .* has a vocabulary of 258"
    for options in ({}, LORA):
        for call in (run_sft, run_rm):
            with pytest.raises(InputError, match=told):
                call(saved_policy, tmp_path / "x", **given, **options)
        with pytest.raises(InputError, match=told):
            run_ppo(
                saved_policy, vowels, tmp_path / "x", **{"share_base": None, **given, **options}
            )
    assert not (tmp_path / "x").exists()


def test_checkpoints_of_a_chain(chain, tmp_path):
    """A run that is cut goes on bit by bit, and a checkpoint holds no base."""
    options = {**ON, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = run_ppo(chain["sft"], chain["rm"], tmp_path / "whole", **options)
    first = tmp_path / "whole" / "checkpoint-1"
    size = sum(path.stat().st_size for path in first.rglob("*.safetensors"))
    assert size < 80_000
    cut = tmp_path / "cut"
    run_ppo(chain["sft"], chain["rm"], cut, **{**options, "max_steps": 1})
    resumed = run_ppo(chain["sft"], chain["rm"], cut, resume_from_checkpoint=True, **options)
    models = [AutoPeftModelForCausalLM.from_pretrained(result) for result in (whole, resumed)]
    states = [model.state_dict() for model in models]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    named = json.loads((whole.path / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == base_of(chain["sft"])


def test_a_reward_adapter_of_another_tokenizer_over_the_same_base(
    chain, tokenizer, ppo_config, tmp_path
):
    folder = shutil.copytree(chain["rm"], tmp_path / "rm")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    told = "rm' and the policy are adapters over one base, but with different tokenizers"
    with pytest.raises(InputError, match=told):
        roles_of(ppo_config, tokenizer, chain["sft"], folder)
