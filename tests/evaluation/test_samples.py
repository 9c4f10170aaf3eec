import pytest
import torch
from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig

from trl_instruct.configs import EvaluateConfig
from trl_instruct.errors import InputError
from trl_instruct.evaluation.measurement import Subject, measure
from trl_instruct.generation.sampling import generate
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.padding import unpadded


def length(prompts, completions):
    return [float(len(text)) for text in completions]


@pytest.fixture
def samples(policy, make_policy, tokenizer, prompts):
    """samples(**EvaluateConfig options): what `measure` finds of a policy beside a reference."""
    policy.generation_config.eos_token_id = [256, *range(32)]

    def sample(reference=None, rows=None, **options):
        rows = rows or {"prompt": prompts, "number": list(range(16))}
        config = EvaluateConfig(**{"reference": "ref", "response_length": 6, "seed": 0, **options})
        models = {"own": policy, "ref": reference or make_policy(seed=2)}
        tokenizers = dict.fromkeys(models, tokenizer)
        rewards = {"length": length}
        if "number" in rows:
            rewards["number"] = lambda prompts, completions, number: number
            rewards["tokens"] = lambda completion_ids, **_: [len(ids) for ids in completion_ids]
        subject = Subject(config, ModelConfig(), models, tokenizers, Dataset.from_dict(rows))
        return measure(subject, rewards)[0]["own"]

    return sample


@pytest.mark.slow
def test_samples_hold_scores_lengths_and_the_kl_of_each_completion(
    samples, policy, make_policy, tokenizer, prompts
):
    result = samples(per_device_eval_batch_size=3)
    assert result.scores["length"] == [len(one.text) for one in result.sampled]
    assert result.scores["number"] == list(range(16))
    lengths = [len(one.ids) for one in result.sampled]
    assert result.scores["tokens"] == lengths
    assert {True, False} == {one.ended for one in result.sampled}
    asked = tokenizer(prompts)["input_ids"]
    set_seed(0)
    stops = [256, *range(32)]
    tokens, *_ = generate(policy, asked, Sampling(6, batch_size=3), eos_token_ids=stops)
    assert unpadded(tokens, torch.tensor(lengths)) == [one.ids for one in result.sampled]
    for row, width in enumerate(lengths):
        ids = torch.tensor([asked[row] + tokens[row, :width].tolist()])
        both = []
        for model in (policy, make_policy(seed=2)):
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, -width - 1 : -1], dim=-1)
            both.append(logprobs.gather(1, ids[0, -width:].unsqueeze(1)).sum().item())
        assert result.kl[row] == pytest.approx(both[0] - both[1], rel=1e-4, abs=1e-5)


def test_samples_repeat_with_their_seed(samples):
    one, again, other = (samples(seed=seed) for seed in (1, 1, 2))
    assert one.sampled == again.sampled != other.sampled
    assert (one.kl, one.scores) == (again.kl, again.scores)


def test_the_kl_to_itself_is_0(samples, policy):
    assert samples(reference=policy).kl == pytest.approx([0.0] * 16, abs=1e-5)


def test_dropout_does_not_reach_the_measurements(make_policy, tokenizer, prompts):
    policy = make_policy("gpt2", resid_pdrop=0.5).train()
    models = {"own": policy, "ref": policy}
    config = EvaluateConfig(reference="ref", response_length=4)
    rows = Dataset.from_dict({"prompt": prompts})
    subject = Subject(config, ModelConfig(), models, dict.fromkeys(models, tokenizer), rows)
    assert measure(subject, {})[0]["own"].kl == pytest.approx([0.0] * 16, abs=1e-5)
    assert policy.training


def test_a_long_prompt_is_cut_from_the_left_as_in_ppo(samples):
    """The end of the prompt is what the policy then sees: the same completions."""
    long, short = {"prompt": ["x" * 5000 + "What?"]}, {"prompt": ["xxxWhat?"]}
    cut = samples(rows=long, max_prompt_length=8)
    assert cut.sampled == samples(rows=short).sampled
    with pytest.raises(InputError, match="max_prompt_length"):
        samples(rows=long)


@pytest.mark.parametrize("one_seed", [False, True])
def test_one_seed_for_all_models_or_each_its_own(policy, tokenizer, prompts, one_seed):
    models = {"one": policy, "other": policy}
    config, rows = EvaluateConfig(response_length=6), Dataset.from_dict({"prompt": prompts})
    given = (config, ModelConfig(), models, dict.fromkeys(models, tokenizer), rows)
    found = measure(Subject(*given, one_seed=one_seed), {})[0]
    assert (found["one"].sampled == found["other"].sampled) is one_seed
