"""transformers' continuous batching draws as the policy would, and says how likely it was."""

import pytest
import torch
from conftest import completion_logprobs
from peft import LoraConfig, get_peft_model

from trl_instruct.configs import PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.generation.engines import PagedSampler, begun
from trl_instruct.generation.sampler import SamplerError
from trl_instruct.generation.sampling import pad_prompts
from trl_instruct.generation.token_sampling import Sampling

PAGED = {"use_transformers_continuous_batching": True}
STOPS = [256, *range(40)]
PROMPTS = [[65, 66], [67], [68, 69, 70]]


@pytest.fixture
def paged(policy, tokenizer):
    """paged(policy): a sampler that has begun."""

    def begin(policy=policy):
        policy.generation_config.eos_token_id = STOPS
        return begun(policy, tokenizer, PPOConfig(report_to="none", **PAGED))

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_tokens_ends_and_log_probabilities(paged, policy, adapted):
    if adapted:
        how = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        policy = get_peft_model(policy, how)
    seen = []
    torch.manual_seed(0)
    how = Sampling(6, temperature=0.7, batch_size=4)
    drawn = paged(policy).draw(PROMPTS, how, copies=4, progress=seen.append)
    assert isinstance(drawn.logprobs, torch.Tensor) and seen == [12]
    asked = pad_prompts([prompt for prompt in PROMPTS for _ in range(4)], policy.device)
    with torch.no_grad():
        expected = completion_logprobs(policy.eval(), *asked, *drawn[:2], temperature=0.7)
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=0)
    for ids, length, ended in zip(*(field.tolist() for field in drawn[:3]), strict=True):
        first = next((place for place, token in enumerate(ids) if token in STOPS), 6)
        assert (length, ended) == (min(first + 1, 6), first < 6)
    assert {True, False} == set(drawn.ended.tolist())
    assert len({tuple(ids) for ids in drawn.completion_ids[:4].tolist()}) == 4


@pytest.mark.slow
def test_a_run_repeats_with_its_seed(make_trainer):
    def run(seed):
        trainer = make_trainer(max_steps=2, seed=seed, response_length=6, **PAGED)
        trainer.train()
        told = [entry for entry in trainer.state.log_history if "eps" in entry]
        return [(entry["objective/scores"], entry["sampling/logprob_diff"]) for entry in told]

    first, again, other = run(1), run(1), run(2)
    assert first == again != other
    assert max(apart for _, apart in first) < 1e-5


def test_what_it_cannot_sample_from(paged, make_policy, monkeypatch):
    with pytest.raises(InputError, match="this policy remembers something else too"):
        paged(make_policy("mamba"))
    with pytest.raises(InputError, match="continuous batching reads no strings"):
        PPOConfig(report_to="none", stop_strings=["x"], **PAGED)
    with pytest.raises(InputError, match="not an option here: use_vllm is set"):
        PPOConfig(report_to="none", use_vllm=True, **PAGED)


def test_an_engine_that_stops(paged, policy, monkeypatch):
    sampler = paged()
    assert isinstance(sampler, PagedSampler)
    with pytest.raises(SamplerError, match="stops at no stop_strings"):
        sampler.draw(PROMPTS, Sampling(4, stop_strings=["x"]))
    monkeypatch.setattr(policy, "generate_batch", lambda *given: {}, raising=False)
    with pytest.raises(SamplerError, match="generate_batch failed: its thread ended"):
        sampler.draw(PROMPTS, Sampling(4))

    def failing(*given):
        raise ValueError("no room for the cache")

    monkeypatch.setattr(policy, "generate_batch", failing, raising=False)
    told = r"generate_batch failed \(ValueError: no room for the cache\). Leave use_transformers_"
    with pytest.raises(SamplerError, match=told):
        sampler.draw(PROMPTS, Sampling(4))
