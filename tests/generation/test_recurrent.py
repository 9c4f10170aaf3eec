"""Which models padding in front of a text disturbs is found out, not listed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_instruct.generation.logits import join
from trl_instruct.generation.sampling import pad_prompts
from trl_instruct.generation.token_sampling import reads_padding
from trl_instruct.ppo_trainer.rollouts import PolicyAndValue, ValueModel


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2", "opt", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_a_mask_do_not_read_padding(make_policy, make_reward_model, kind, dtype):
    for model in (make_policy(kind), make_reward_model(kind)):
        assert not reads_padding(model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rwkv_does(make_policy, make_reward_model, dtype):
    policy = make_policy("rwkv").to(dtype)
    adapted = get_peft_model(make_policy("rwkv"), LoraConfig(target_modules="all-linear"))
    for model in (policy, adapted, make_reward_model("rwkv").to(dtype)):
        assert reads_padding(model)


def test_a_model_is_asked_once_with_dropout_off_and_left_as_it_was(make_policy):
    policy = make_policy("gpt2", resid_pdrop=0.9, embd_pdrop=0.9).train()
    calls = []
    policy.base_model.register_forward_hook(lambda *_: calls.append(1))
    assert not reads_padding(policy)
    assert policy.training
    asked = len(calls)
    assert not reads_padding(policy)
    assert len(calls) == asked


def test_rwkvs_cache_mixes_the_rows_of_a_batch(make_policy):
    """Why `generate` gives it one prompt at a time; should this fail, it can have batches again."""
    policy = make_policy("rwkv").eval()
    ids, token = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[9], [10]])
    with torch.no_grad():
        state = policy(ids, use_cache=True).state
        step = policy(token, state=state, use_cache=True).logits[:, -1]
        whole = policy(torch.cat([ids, token], dim=1), use_cache=False).logits[:, -1]
    assert (step - whole).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "rwkv"])
def test_nothing_flows_through_padding(make_policy, make_reward_model, kind):
    model = PolicyAndValue(make_policy(kind), ValueModel(make_reward_model(kind)))
    prompts, lengths = pad_prompts([[5, 6, 7], [8]], torch.device("cpu"))
    completions = torch.tensor([[20, 21, 22], [23, 9, 9]])
    sequences = join(prompts, lengths, completions, torch.tensor([3, 1]))
    logprobs, _, values = model(sequences, torch.tensor([20, 21, 22, 23]))
    assert (logprobs.shape, values.shape) == ((4,), (4,))
    (logprobs[3] + values[3]).backward()
    embedding = model.policy.get_input_embeddings().weight.grad
    assert embedding[8].any() and not embedding[[0, 5, 20]].any()
