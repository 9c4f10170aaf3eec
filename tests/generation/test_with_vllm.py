"""PPO sampled by vLLM itself: `make test-vllm` (its CPU build, in an environment of its own)."""

import copy
import os

import pytest
import torch
from accelerate import Accelerator
from conftest import completion_logprobs, letters, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import ModelConfig

from trl_instruct.configs import EvaluateConfig, PPOConfig
from trl_instruct.evaluation.measurement import Subject, measure
from trl_instruct.generation.engines import VLLMSampler
from trl_instruct.generation.sampler import SamplerError
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.padding import right_padded_mask

pytest.importorskip(
    "vllm", reason="vLLM is not installed; `make test-vllm` makes it an environment"
)
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
LONGEST = 6
VLLM = {"use_vllm": True, "vllm_max_model_length": 96}
SIZES = {
    "llama": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 64, "n_head": 2},
}


def made(kind="llama", seed=0, **options):
    """A policy whose heads have a size for which vLLM has kernels, with many EOS tokens."""
    policy = tiny_model(kind, seed=seed, **SIZES[kind], **options)
    policy.generation_config.eos_token_id = [256, *range(40)]
    return policy


@pytest.fixture
def make_run(make_trainer):
    """make_run(policy, **PPOConfig options): a trainer of three iterations with vLLM."""

    def make(policy, **options):
        given = {"max_steps": 3, "response_length": LONGEST, "learning_rate": 3e-3, **VLLM}
        trainer = make_trainer(model=policy, **given | options)
        trainer.drawn = []
        sample = trainer.sample

        def keep(rows):
            rollout = sample(rows)
            trainer.drawn.append(rollout)
            return rollout

        trainer.sample = keep
        return trainer

    return make


def check_drawn(policy, rollout, temperature=1.0):
    """The log-probabilities are those of a forward pass; tokens after the end count nowhere."""
    expected = completion_logprobs(policy, *rollout[:4], temperature=temperature)
    torch.testing.assert_close(rollout.sampler_logprobs, expected, atol=1e-4, rtol=0)
    mask = right_padded_mask(rollout.completion_lengths, LONGEST)
    stops = torch.isin(rollout.completion_ids, torch.tensor([256, *range(40)])) & mask
    assert (stops.any(dim=1) == rollout.ended).all() and {True, False} == set(
        rollout.ended.tolist()
    )
    assert (stops.sum(dim=1) <= 1).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_iteration_samples_from_the_policy_as_it_is(make_run, kind, tied):
    trainer = make_run(made(kind, tie_word_embeddings=tied), temperature=0.7)
    before = copy.deepcopy(trainer.policy)
    trainer.train()
    told = [entry["sampling/logprob_diff"] for entry in trainer.state.log_history if "eps" in entry]
    assert len(told) == 3 and max(told) < 1e-5
    check_drawn(before, trainer.drawn[0], temperature=0.7)
    last = trainer.drawn[-1]
    old = completion_logprobs(before, *last[:4], temperature=0.7)
    assert (old - last.sampler_logprobs).abs().max() > 0.01


def test_lora_is_sampled_and_its_base_stays_as_it_is(make_run):
    torch.manual_seed(3)
    how = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(made(), how)
    trainer = make_run(policy)
    frozen = {n: w.clone() for n, w in policy.named_parameters() if not w.requires_grad}
    trainer.train()
    check_drawn(policy, trainer.sample([0, 1, 2, 3, 4, 5, 6, 7]))
    for name, weight in policy.named_parameters():
        assert name not in frozen or torch.equal(weight, frozen[name]), name


def test_a_resumed_run_repeats_the_draws(make_run, tmp_path):
    whole = make_run(made(), output_dir=str(tmp_path / "a"), save_steps=1, save_strategy="steps")
    whole.train()
    calls = []

    def failing(prompts, completions):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return letters(prompts, completions)

    given = {"output_dir": str(tmp_path / "b"), "save_steps": 1, "save_strategy": "steps"}
    with pytest.raises(KeyboardInterrupt):
        make_run(made(), reward_model=failing, **given).train()
    resumed = make_run(made(), **given)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.drawn) == 1
    assert torch.equal(resumed.drawn[0].completion_ids, whole.drawn[2].completion_ids)
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_engine_that_breaks_leaves_the_run_to_be_resumed(make_run, tmp_path):
    trainer = make_run(made(), output_dir=str(tmp_path), save_strategy="no")
    generate, calls = trainer.sampler.engine.llm.generate, []

    def breaking(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("EngineCore died")
        return generate(*given, **options)

    trainer.sampler.engine.llm.generate = breaking
    with pytest.raises(SamplerError, match=r"Iteration 3: vLLM failed \(RuntimeError: EngineCore"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "ppo_state.json").is_file()


def test_stop_strings_end_a_completion(tokenizer):
    sampler = VLLMSampler(PPOConfig(report_to="none", use_cpu=True, bf16=False, **VLLM))
    policy = made()
    sampler.begin(policy, tokenizer, Accelerator(cpu=True))
    sampler.follow()
    alone = {token: tokenizer.decode([token]) for token in range(40, 90)}
    strings = {token: text for token, text in alone.items() if text.isascii() and text.isalnum()}
    how = Sampling(LONGEST, stop_strings=[*strings.values()])
    drawn = sampler.draw([[65, 66]] * 40, how)
    stops, ends = {256, *range(40), *strings}, 0
    for ids, length, ended in zip(*(field.tolist() for field in drawn[:3]), strict=True):
        first = next((place for place, token in enumerate(ids) if token in stops), LONGEST)
        assert (length, ended) == (min(first + 1, LONGEST), first < LONGEST)
        ends += ids[length - 1] in strings
    assert ends > 3 and len({tuple(ids) for ids in drawn.completion_ids.tolist()}) > 20


def test_checkpoints_are_evaluated_one_after_the_other(tokenizer, prompts):
    models = {"one": made(), "two": made(seed=2)}
    how = EvaluateConfig(
        reference="one", response_length=LONGEST, report_to="none", use_cpu=True, bf16=False, **VLLM
    )
    rows = Dataset.from_dict({"prompt": prompts})
    subject = Subject(how, ModelConfig(), models, dict.fromkeys(models, tokenizer), rows)
    found = measure(subject, {"letters": letters})[0]
    assert found["one"].sampled != found["two"].sampled
    assert found["two"].kl is not None and sum(found["two"].kl) > 1
