import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from trl_instruct.errors import InputError
from trl_instruct.evaluation.samples import sample_and_score, summarize
from trl_instruct.generation.sampling import generate
from trl_instruct.intervals import mean_interval


def length(prompts, completions):
    return [float(len(text)) for text in completions]


@pytest.fixture
def samples(policy, make_policy, tokenizer, prompts):
    policy.generation_config.eos_token_id = [256, *range(32)]

    def sample(**options):
        rows = Dataset.from_dict({"prompt": prompts, "number": list(range(16))})
        options = {"ref_policy": make_policy(seed=2), "response_length": 6, **options}
        rewards = {"length": length, "number": lambda prompts, completions, number: number}
        return sample_and_score(policy, tokenizer, rows, rewards, **options)

    return sample


@pytest.mark.slow
def test_samples_hold_scores_lengths_and_the_kl_of_each_completion(
    samples, policy, make_policy, tokenizer, prompts
):
    result = samples(batch_size=3)
    assert result.scores["length"] == [len(text) for text in result.completions]
    assert result.scores["number"] == list(range(16))
    assert {True, False} == set(result.ended)
    asked = tokenizer(prompts)["input_ids"]
    set_seed(0)
    stops = [256, *range(32)]
    tokens, _, _ = generate(policy, asked, max_new_tokens=6, eos_token_ids=stops, batch_size=3)
    for row, width in enumerate(result.lengths):
        ids = torch.tensor([asked[row] + tokens[row, :width].tolist()])
        both = []
        for model in (policy, make_policy(seed=2)):
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, -width - 1 : -1], dim=-1)
            both.append(logprobs.gather(1, ids[0, -width:].unsqueeze(1)).sum().item())
        assert result.kl[row] == pytest.approx(both[0] - both[1], rel=1e-4, abs=1e-5)


def test_samples_repeat_with_their_seed(samples):
    assert samples(seed=1) == samples(seed=1)
    assert samples(seed=1).completions != samples(seed=2).completions


def test_the_kl_to_itself_or_to_nothing_is_0(samples, policy):
    assert samples(ref_policy=policy).kl == pytest.approx([0.0] * 16, abs=1e-5)
    assert samples(ref_policy=None).kl == [0.0] * 16


def test_dropout_does_not_reach_the_measurements(make_policy, tokenizer, prompts):
    policy = make_policy("gpt2", resid_pdrop=0.5).train()
    rows = Dataset.from_dict({"prompt": prompts})
    result = sample_and_score(policy, tokenizer, rows, {}, ref_policy=policy, response_length=4)
    assert result.kl == pytest.approx([0.0] * 16, abs=1e-5)
    assert policy.training


def test_a_long_prompt_is_cut_from_the_left_as_in_ppo(policy, tokenizer):
    """The end of the prompt is what the policy then sees: the same completions."""
    given = {"rewards": {"length": length}, "ref_policy": None, "response_length": 6}
    long = Dataset.from_dict({"prompt": ["x" * 5000 + "What?"]})
    short = Dataset.from_dict({"prompt": ["xxxWhat?"]})
    cut = sample_and_score(policy, tokenizer, long, max_prompt_length=8, **given)
    assert cut.completions == sample_and_score(policy, tokenizer, short, **given).completions
    with pytest.raises(InputError, match="max_prompt_length"):
        sample_and_score(policy, tokenizer, long, **given)


def test_the_summary_holds_means_and_intervals(samples):
    result = samples()
    summary = summarize(result)
    assert summary["length"] == sum(result.lengths) / 16  # tokens, though a reward has that name
    assert summary["number"] == mean_interval(list(range(16)))._asdict()
    assert summary["kl"] == pytest.approx(sum(result.kl) / 16)
    assert summary["ended"] == sum(result.ended) / 16
