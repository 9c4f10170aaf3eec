"""The value as a head on the policy: one trunk, one pass, both losses."""

import pytest
import torch
from datasets import Dataset
from test_ppo_trainer import SGD, trained, weights
from test_recipes import PROMPTS, QUICK_PPO
from test_rollouts import batch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_instruct.errors import InputError
from trl_instruct.generation.logits import join
from trl_instruct.models.shared_base import classifier_around
from trl_instruct.padding import right_padded_mask
from trl_instruct.ppo_trainer.rollouts import PolicyAndValue, ValueModel, state_values
from trl_instruct.ppo_trainer.token_statistics import token_statistics
from trl_instruct.recipes.ppo import ppo
from trl_instruct.scalar_head import score_head


def with_head(policy):
    value = classifier_around(policy)
    torch.manual_seed(1)
    torch.nn.init.normal_(score_head(value).weight)
    return value


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "rwkv", "mamba"])
def test_one_pass_gives_what_two_give(make_policy, kind):
    """Log-probabilities, values, gradients; a model that passes by its backbone needs two."""
    policy = make_policy(kind).eval()
    model = PolicyAndValue(policy, ValueModel(with_head(policy)))
    tokens, passes = batch(), []
    sequences = join(*tokens)
    chosen = tokens[2][right_padded_mask(tokens[3], tokens[2].shape[1])]
    policy.base_model.register_forward_hook(lambda *_: passes.append(1))
    one = model(sequences, chosen)[::2]
    assert len(passes) == 1  # OPT's language model passes by its backbone: its one is the value's
    apart, _ = token_statistics(policy, sequences, chosen, temperature=1.0)
    two = apart, state_values(model.value, sequences)
    torch.testing.assert_close(one, two)
    gradients = [
        torch.autograd.grad(logprobs.square().mean() + values.sum(), list(model.parameters()))
        for logprobs, values in (one, two)
    ]
    torch.testing.assert_close(*(in_units_of_the_largest(each) for each in gradients))


def in_units_of_the_largest(gradients):
    """An untrained RWKV's are sums of thousands that nearly cancel out."""
    largest = max(gradient.abs().max() for gradient in gradients)
    return [gradient / largest for gradient in gradients]


def test_both_losses_train_the_trunk(make_trainer, make_policy):
    def run(vf_coef):
        policy = make_policy()
        given = {"model": policy, "value_model": with_head(policy)}
        trainer = make_trainer(vf_coef=vf_coef, cliprange_value=100.0, **given, **SGD)
        return weights(policy.model.layers), trained(trainer)

    before, alone = run(0.0)
    _, both = run(1.0)
    name = "policy.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(alone[name], both[name])
    assert not torch.equal(alone[name], before["0.self_attn.q_proj.weight"])


def test_the_heads_own_learning_rate_is_not_the_trunks(make_trainer, make_policy):
    policy = make_policy()
    value = with_head(policy)
    trainer = make_trainer(model=policy, value_model=value, value_learning_rate=0.5)
    trainer.begin_training()
    groups = {g["initial_lr"]: g["params"] for g in trainer.optimizer.param_groups if g["params"]}
    assert [p is score_head(value).weight for p in groups[0.5]] == [True]


def one(prompts, completions):
    return [1.0] * len(completions)


@pytest.mark.slow
def test_ppo_with_a_value_head(saved_policy, tmp_path):
    """It resumes, and a checkpoint's value model is a plain classifier."""
    prompts, given = Dataset.from_list(PROMPTS), {"value_model_path": "value_head", **QUICK_PPO}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = ppo(saved_policy, one, prompts, tmp_path / "a", **{**given, **saving, "max_steps": 2})
    ppo(saved_policy, one, prompts, tmp_path / "b", **{**given, **saving})
    options = {**given, "max_steps": 2, "resume_from_checkpoint": True}
    again = ppo(saved_policy, one, prompts, tmp_path / "b", **options)
    states = [AutoModelForCausalLM.from_pretrained(r).state_dict() for r in (whole, again)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    folder = whole.path / "checkpoint-2" / "value_model"
    value = AutoModelForSequenceClassification.from_pretrained(folder)
    trunk = {f"model.{name}": weight for name, weight in value.model.state_dict().items()}
    torch.testing.assert_close(trunk, {name: states[0][name] for name in trunk}, rtol=0, atol=0)
    assert value.score.weight.any()


@pytest.mark.slow
def test_not_with_lora(saved_policy, tmp_path):
    options = {**QUICK_PPO, "value_model_path": "value_head", "use_peft": True}
    with pytest.raises(InputError, match="With LoRA leave it out"):
        ppo(saved_policy, one, Dataset.from_list(PROMPTS), tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
